"""A run that goes on from a checkpoint with another global batch: where in the data, and how long its schedule is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.errors import PromiseError
from tests.lightning.toys import Regression, largest_difference, quiet_trainer, regression_data, weights

SAMPLES, EPOCHS = 64, 3


class Saves(Callback):
    """Saves after a micro-batch, and stops there if told so."""

    def __init__(self, path: Path, epoch: int, micro_batch: int, *, stops: bool = True) -> None:
        self.path, self.where, self.stops = path, (epoch, micro_batch), stops

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stops


class Seen(Regression):
    """Notes the first feature of every sample, and the rate of every step."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[float] = []
        self.steps: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.samples += batch[0][:, 0].tolist()
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(optimizer.param_groups[0]["lr"])


def run(
    large_batch: LargeBatch, *callbacks: Any, resume: Path | None = None, module: Any = None, **options: Any
) -> Any:
    module = module or Seen()
    trainer = quiet_trainer(callbacks=[large_batch, *callbacks], **{"max_epochs": EPOCHS, **options})
    trainer.fit(module, DataLoader(regression_data(SAMPLES), 4), ckpt_path=resume and str(resume))
    return module


@pytest.mark.parametrize("where", [(0, 5), (0, 12), (0, 15), (1, 6)])
@pytest.mark.parametrize("batch", [8, 24, 32])
def test_no_sample_is_left_out_and_the_schedule_ends_with_the_training(
    tmp_path: Path, batch: int, where: tuple[int, int]
) -> None:
    """The position was kept in windows: after two of 16 samples, windows of 32 left out 32 samples, and windows of 8
    brought 16 again. A StagedWarmup kept the length of a training that has one batch: it ended too early or too late.
    """
    run(LargeBatch(16, base_batch_size=4, warmup_steps=2), Saves(tmp_path / "16.ckpt", *where))
    done = 4 * where[0] + (where[1] + 1) // 4
    left = 16 * (done % 4) // batch * batch  # samples of the present epoch that need not come again
    large_batch = LargeBatch(batch, base_batch_size=4, warmup_steps=2, on_plan_change="adopt")
    later = Saves(tmp_path / "later.ckpt", 1, 9, stops=False)
    module = run(large_batch, later, resume=tmp_path / "16.ckpt")

    every = regression_data(SAMPLES).tensors[0][:, 0].tolist()
    assert module.samples == every[left:] + every * (EPOCHS - 1 - done // 4)
    per_epoch = -(-SAMPLES // batch)
    steps = per_epoch * (EPOCHS - done // 4) - left // batch
    assert len(module.steps) == steps
    peak, total = 0.02 * (batch / 4) ** 0.5, done + steps
    ramp = [peak * ((step + 1) / 2 if step < 2 else 1 - step / total) for step in range(done, total)]
    assert module.steps == pytest.approx(ramp)

    again = run(LargeBatch(batch, base_batch_size=4, warmup_steps=2), resume=tmp_path / "later.ckpt")
    assert again.steps == module.steps[-len(again.steps) :]
    assert largest_difference(weights(again), weights(module)) == 0.0


class OneCycle(Seen):
    """A schedule of the length that the Trainer tells."""

    def configure_optimizers(self) -> Any:
        optimizer = Lamb(self.named_parameters(), lr=0.01)
        total = self.trainer.estimated_stepping_batches
        return [optimizer], [{"scheduler": OneCycleLR(optimizer, 0.01, total), "interval": "step"}]


def test_a_schedule_of_the_old_length_is_refused(tmp_path: Path) -> None:
    run(LargeBatch(16), Saves(tmp_path / "16.ckpt", 0, 9), module=OneCycle())
    with pytest.raises(PromiseError, match="length of OneCycleLR in optimizer steps: LargeBatch announced 7, and it"):
        run(LargeBatch(32, on_plan_change="adopt"), resume=tmp_path / "16.ckpt", module=OneCycle())


@pytest.mark.parametrize("options", [{"max_steps": 50}, {"max_steps": 7}, {}])
def test_a_resumed_training_is_as_long_as_its_shorter_limit(tmp_path: Path, options: dict[str, Any]) -> None:
    """Beside max_epochs=3, max_steps=50 counted alone: the check raised about a OneCycleLR of the right 12 steps."""
    whole = run(LargeBatch(16), module=OneCycle(), **options)
    run(LargeBatch(16), Saves(tmp_path / "saved.ckpt", 0, 13), module=OneCycle(), **options)
    resumed = run(LargeBatch(16), resume=tmp_path / "saved.ckpt", module=OneCycle(), **options)
    assert resumed.steps == whole.steps[3:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_further_fit_says_which_steps_a_schedule_must_leave_out() -> None:
    trainer, module = quiet_trainer(callbacks=[LargeBatch(16)], max_epochs=1), OneCycle()
    trainer.fit(module, DataLoader(regression_data(SAMPLES), 4))
    trainer.fit_loop.max_epochs = EPOCHS
    with pytest.raises(PromiseError, match=r"announced 8, and it is 12.*Take the 4 steps of earlier fits off"):
        trainer.fit(module, DataLoader(regression_data(SAMPLES), 4))
