"""The launcher of the distributed tests itself: results, failures, deaths, hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

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


def note_and_hang(note: str) -> None:
    Path(note).with_suffix(".new").write_text(str(os.getpid()))
    Path(note).with_suffix(".new").rename(note)
    hang()


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


def wait_for(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children that their parent died")
def test_ranks_do_not_outlive_a_test_process_that_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "from tests.distributed import run_ranks; from tests.test_distributed_launcher import note_and_hang; "
        f"run_ranks(note_and_hang, 1, {str(note)!r}, init_group=False)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        assert wait_for(note.exists)
        status = Path(f"/proc/{note.read_text()}/stat")
        assert status.exists()
    finally:
        parent.kill()
        parent.wait()
    # A zombie is dead too; who reaps it is the machine's business.
    assert wait_for(lambda: not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z")
