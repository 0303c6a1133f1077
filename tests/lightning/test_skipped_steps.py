"""A GradScaler skips the optimizer's step where gradients overflowed; our schedule does not advance either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_lamb import Lamb, LambMixin, LargeBatch, StagedWarmup
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data

OVERFLOWS = {2, 3, 5}


class Overflowing(LambMixin, Regression):
    """Its loss is infinite at some steps; one micro-batch makes a step."""

    lamb_schedule = {"warmup_steps": 2}

    def __init__(self) -> None:
        super().__init__()
        self.net.float()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = (self.net(inputs.float()).float() - targets).pow(2).mean()
        return loss * float("inf") if batch_idx in OVERFLOWS else loss


class ByLargeBatch(Overflowing):
    """Its warm-up is LargeBatch's."""

    lamb_schedule = None


def scaling() -> Any:
    """With a scaler on the CPU, where the Trainer's precision="16-mixed" means bf16."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))


@pytest.mark.parametrize("module", [Overflowing, ByLargeBatch])
def test_lightning_steps_its_schedulers_and_ours_stays(module: type[Overflowing]) -> None:
    model = module()
    callbacks: list[Any] = [LargeBatch(4, base_batch_size=4, warmup_steps=2)] if module is ByLargeBatch else []
    trainer = quiet_trainer(plugins=[scaling()], max_epochs=1, callbacks=callbacks)
    trainer.fit(model, Batches(regression_data(32), 4))
    optimizer = trainer.optimizers[0]
    assert trainer.global_step == 8
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {5.0}
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 5


def scheduled() -> tuple[nn.Parameter, Lamb, StagedWarmup]:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("weight", parameter)], lr=0.1)
    return parameter, optimizer, StagedWarmup(optimizer, total_steps=10, warmup_steps=4)


def test_a_schedule_that_follows_counts_steps_and_no_calls() -> None:
    parameter, optimizer, schedule = scheduled()
    schedule.follow_optimizer()
    schedule.follow_optimizer()  # twice is once
    rate = optimizer.param_groups[0]["lr"]
    schedule.step()
    assert (schedule.last_epoch, optimizer.param_groups[0]["lr"]) == (0, rate)
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    schedule.step()
    schedule.step()
    assert schedule.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * rate)


def test_elsewhere_a_schedule_counts_calls_as_torchs_do() -> None:
    _, _, schedule = scheduled()
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        schedule.step()
    assert schedule.last_epoch == 1
