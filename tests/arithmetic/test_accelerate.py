"""StagedWarmup under Hugging Face's accelerate, which steps a prepared scheduler once per process."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

from lightning_lamb import Lamb, StagedWarmup
from tests.distributed import run_ranks


def rates_on_a_rank(follows: bool, accumulation: int) -> list[float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = torch.nn.Linear(2, 2)
    optimizer = Lamb(model.named_parameters(), lr=0.08)
    scheduler = StagedWarmup(optimizer, total_steps=8, warmup_steps=4)
    if follows:
        scheduler.follow_optimizer()
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rates: list[float] = []
    for _ in range(4 * accumulation):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 2)).sum())
            if accelerator.sync_gradients:
                rates.append(round(optimizer.param_groups[0]["lr"], 6))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return rates


def rates_of_all_on_a_rank() -> list[list[float]]:
    return [rates_on_a_rank(True, 1), rates_on_a_rank(False, 1)]


def test_a_prepared_schedule_counts_each_step_once_if_it_follows_the_optimizer() -> None:
    """On two processes the warm-up was over after half of its steps; docs/schedules.md has the remedy."""
    for following, stock in run_ranks(rates_of_all_on_a_rank, 2):
        assert following == [0.02, 0.04, 0.06, 0.08]
        assert stock == [0.02, 0.06, 0.04, 0.02]  # if this changes, the remedy can go


def accumulating_rates_on_a_rank() -> list[float]:
    return rates_on_a_rank(True, 2)


@pytest.mark.slow
def test_micro_batches_do_not_count() -> None:
    for rates in run_ranks(accumulating_rates_on_a_rank, 2):
        assert rates == [0.02, 0.04, 0.06, 0.08]
