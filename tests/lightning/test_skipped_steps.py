"""A GradScaler skips the optimizer's step where gradients overflowed; our schedule does not advance either."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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


# ---- stages: one clock for batch, learning rate and length


class InStages(Regression):
    """Notes what every optimizer step that was taken saw; its loss is infinite in some windows."""

    def __init__(self, overflows: set[int], fused: bool = False) -> None:
        super().__init__(optimizer=lambda named: Lamb(named, lr=0.1, fused=fused))
        self.net.float()
        self.overflows, self.windows, self.samples, self.taken = overflows, 0, 0, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.samples += len(inputs)
        loss = (self.net(inputs.float()).float() - targets).pow(2).mean()
        return loss * float("inf") if self.windows in self.overflows else loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.windows not in self.overflows:
            self.taken.append((self.samples, round(float(optimizer.param_groups[0]["lr"]), 6)))
        self.windows, self.samples = self.windows + 1, 0


STAGES = [
    {"global_batch_size": 4, "steps": 4, "warmup_steps": 2, "lr": 0.1},
    {"global_batch_size": 8, "steps": 3, "warmup_steps": 1, "lr": 0.2},
]


def in_stages(overflows: set[int], fused: bool = False, checkpoint: Any = None, **options: Any) -> Any:
    module, large_batch = InStages(overflows, fused), LargeBatch(stages=STAGES, micro_batch_size=4)
    callbacks = [large_batch, *options.pop("callbacks", [])]
    trainer = quiet_trainer(plugins=[scaling()], callbacks=callbacks, max_epochs=-1, **options)
    trainer.fit(module, Batches(regression_data(32), 4), ckpt_path=checkpoint)
    return module, trainer, large_batch


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("overflows", [{1}, {3}, {4, 5}, {0, 3, 6, 9}])
def test_skipped_steps_move_stage_schedule_batch_and_length_together(overflows: set[int], fused: bool) -> None:
    """The batch changed by Lightning's count of steps and the rate by the optimizer's; stages lost skipped steps."""
    undisturbed, _, _ = in_stages(set())
    module, trainer, large_batch = in_stages(overflows, fused)
    assert module.taken == undisturbed.taken
    assert [samples for samples, _ in module.taken] == [4] * 4 + [8] * 3
    assert trainer.global_step == 7 + len(overflows)
    assert trainer.max_steps == 7  # as the stages say, for another fit
    assert large_batch.stage == 1


@pytest.mark.parametrize("step", [3, 5, 6, 8])
def test_a_resumed_training_goes_on_by_the_steps_that_were_taken(tmp_path: Path, step: int) -> None:
    overflows = {1, 3, 6}
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _, _ = in_stages(overflows, callbacks=[every], enable_checkpointing=True)
    left = {window - step for window in overflows}
    module, trainer, _ = in_stages(left, checkpoint=tmp_path / f"step={step}.ckpt")
    done = step - len([window for window in overflows if window < step])
    assert module.taken == whole.taken[done:]
    assert trainer.global_step == 10


def test_gradients_that_always_overflow_do_not_train_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lamb.callbacks.step_clock.MOST_SKIPPED_IN_A_ROW", 3)
    with pytest.warns(UserWarning, match="skipped 4 steps in a row"):
        _, trainer, _ = in_stages(set(range(1000)))
    assert trainer.global_step == 10
