"""The launcher of the distributed tests itself: results, failures, deaths, hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, rank, run_ranks, world_size


def add_up(start: float) -> torch.Tensor:
    assert torch.get_num_threads() == 1
    total = torch.tensor(start + rank())
    dist.all_reduce(total)
    return total


def fail_on_one() -> None:
    if rank() == 1:
        print("what rank 1 printed")
        raise ValueError("rank 1 has had enough")
    dist.barrier()  # never answered: must not cost the deadline


def die_on_one() -> None:
    if rank() == 1:
        os._exit(7)
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def test_results_come_back_by_rank_and_tensors_survive_their_process() -> None:
    assert [float(total) for total in run_ranks(add_up, 3, 1.0)] == [6.0, 6.0, 6.0]
    assert run_ranks(world_size, 2, init_group=False) == [2, 2]


def test_a_failing_rank_is_reported_with_its_output_and_the_others_are_killed_soon() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 0.*rank 1 has had enough.*what rank 1 printed"):
        run_ranks(fail_on_one, 2, timeout=120)
    assert time.monotonic() - start < 60


def test_a_dying_rank_is_reported_with_its_exit_code() -> None:
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(die_on_one, 2, timeout=120)


def test_a_hang_costs_the_deadline_and_says_where_it_hangs() -> None:
    with pytest.raises(RankError, match=r"(?s)did not finish.*in hang"):
        run_ranks(hang, 1, timeout=20, init_group=False)
