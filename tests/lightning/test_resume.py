"""A run that is stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lamb import Lamb, LargeBatch, StagedWarmup
from lightning_lamb.errors import PlanError
from tests.distributed import run_ranks
from tests.lightning.toys import (
    Batches,
    Recorder,
    Regression,
    largest_difference,
    quiet_trainer,
    regression_data,
    weights,
)

SAMPLES = 30  # windows of 8 8 8 6: every epoch ends on a short one


def train(
    folder: Path | str | None = None,
    resume: Path | str | None = None,
    *,
    data: LightningDataModule | None = None,
    ranks: int = 1,
    module: Regression | None = None,
    large_batch: LargeBatch | None = None,
    epochs: int = 3,
    every: dict[str, Any] | None = None,
) -> Regression:
    """Trains 3 epochs; with ``folder`` it saves at the end of every epoch, with ``resume`` it continues."""
    module = module or Regression()
    callbacks: list[Any] = [large_batch or LargeBatch(8, base_batch_size=2, warmup_steps=3), Recorder()]
    if folder is not None:
        saver = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **(every or {"every_n_epochs": 1}))
        callbacks.append(saver)
    trainer = quiet_trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        enable_checkpointing=folder is not None,
        use_distributed_sampler=False,
    )
    data = data or Batches(regression_data(SAMPLES), 2)
    trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return module


@pytest.mark.parametrize("checkpoint", ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"])
def test_resuming_at_the_end_of_an_epoch_is_bitwise_exact(tmp_path: Path, checkpoint: str) -> None:
    whole = train(tmp_path)
    resumed = train(resume=tmp_path / checkpoint)
    done = len(whole.rates) - len(resumed.rates)
    assert resumed.rates == whole.rates[done:]  # the learning rate is not scaled a second time
    assert max(whole.rates) == pytest.approx(0.04)
    assert all(torch.equal(a, b) for a, b in zip(resumed.gradients, whole.gradients[done:], strict=True))
    assert largest_difference(weights(resumed), weights(whole)) == 0.0


def test_checkpoints_hold_primitives_and_tensors_only(tmp_path: Path) -> None:
    """With a class of ours inside, ``torch.load(weights_only=True)``, Lightning's way under FSDP, would refuse."""
    train(tmp_path)
    saved = torch.load(tmp_path / "epoch=0-step=4.ckpt", weights_only=True)
    state = saved["callbacks"]["LargeBatch"]
    assert state["accumulate_grad_batches"] == 4
    assert state["rules"]["global_batch_size"] == 8
    assert saved["lightning_lamb_position"]["micro_batches"] == 0


# ---- in the middle of an epoch, with a loader that knows its position (in samples over all ranks)


class Stateful:
    """A loader that continues where its state says."""

    def __init__(self, batch_size: int, rank: int, ranks: int) -> None:
        self.batch_size, self.rank, self.ranks, self.position = batch_size, rank, ranks, 0
        self.data = regression_data(32)

    def __len__(self) -> int:
        return 32 // (self.batch_size * self.ranks)

    def __iter__(self) -> Iterator[list[Tensor]]:
        start, self.position = self.position, 0
        for first in range(start, 32, self.batch_size * self.ranks):
            self.position = (first + self.batch_size * self.ranks) % 32  # Lightning does not exhaust the generator
            yield list(self.data[first + self.rank * self.batch_size : first + (self.rank + 1) * self.batch_size])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class StatefulData(LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Stateful:
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return Stateful(self.batch_size, ranks["rank"], ranks["num_replicas"])


def at_every_step(module: Regression | None = None) -> dict[str, Any]:
    return {"data": StatefulData(), "every": {"every_n_train_steps": 1}, "module": module}


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7])
def test_resuming_at_any_step_with_a_stateful_loader_is_bitwise_exact(tmp_path: Path, step: int) -> None:
    whole = train(tmp_path, **at_every_step(), epochs=2)
    resumed = train(resume=next(tmp_path.glob(f"*step={step}.ckpt")), data=StatefulData(), epochs=2)
    assert resumed.micro_batches == [2] * 4 * (8 - step)
    assert resumed.rates == whole.rates[step:]
    assert largest_difference(weights(resumed), weights(whole)) == 0.0


class AsksForTheEstimate(Regression):
    """A module that reads estimated_stepping_batches, which makes the loader before the checkpoint is restored."""

    def configure_optimizers(self) -> Any:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer = Lamb(self.named_parameters(), lr=0.02)
        return [optimizer], [StagedWarmup(optimizer, total_steps=steps)]


def test_reading_the_estimate_does_not_cost_the_position_in_the_data(tmp_path: Path) -> None:
    """Lightning #20550: the loader would start from its beginning."""
    whole = train(tmp_path, **at_every_step(AsksForTheEstimate()), large_batch=LargeBatch(8), epochs=2)
    checkpoint = next(tmp_path.glob("*step=3.ckpt"))
    resumed = train(
        resume=checkpoint, data=StatefulData(), module=AsksForTheEstimate(), large_batch=LargeBatch(8), epochs=2
    )
    assert largest_difference(weights(resumed), weights(whole)) == 0.0


def test_another_micro_batch_continues_at_the_same_sample(tmp_path: Path) -> None:
    """Accumulation 4 becomes 2: Lightning's micro-batch counters are translated, windows stay windows."""
    whole = train(tmp_path, **at_every_step(), epochs=2)
    for step in (1, 3, 4, 6):
        checkpoint = next(tmp_path.glob(f"*step={step}.ckpt"))
        resumed = train(resume=checkpoint, data=StatefulData(4), epochs=2)
        assert resumed.micro_batches == [4] * 2 * (8 - step)
        assert largest_difference(weights(resumed), weights(whole)) < 1e-12


def resumed_on_a_rank(checkpoint: str, stateful: bool) -> dict[str, Any]:
    module = train(resume=checkpoint, ranks=2, data=StatefulData() if stateful else None, epochs=2 if stateful else 3)
    return {"weights": weights(module), "rates": module.rates}


def whole_and_resumed_on_a_rank(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = train(folder, ranks=2)
    torch.distributed.barrier()
    resumed = train(resume=Path(folder) / "epoch=1-step=8.ckpt", ranks=2)
    return weights(whole), weights(resumed)


def test_two_ranks_resume_bitwise(tmp_path: Path) -> None:
    for whole, resumed in run_ranks(whole_and_resumed_on_a_rank, 2, str(tmp_path), init_group=False):
        assert largest_difference(whole, resumed) == 0.0


def test_two_ranks_continue_what_one_began(tmp_path: Path) -> None:
    """The global batch stays: accumulation 4 becomes 2, and the learning rate does not move."""
    whole = train(tmp_path, **at_every_step(), epochs=2)
    checkpoint = next(tmp_path.glob("*step=3.ckpt"))
    for result in run_ranks(resumed_on_a_rank, 2, str(checkpoint), True, init_group=False):
        assert result["rates"] == whole.rates[3:]
        assert largest_difference(result["weights"], weights(whole)) < 1e-12


# ---- a changed plan


def test_resuming_with_another_batch_shows_the_difference_and_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    other = LargeBatch(16, base_batch_size=2, warmup_steps=3)
    with pytest.raises(PlanError, match="global_batch_size: 8 in the checkpoint, 16 now"):
        train(resume=tmp_path / "epoch=0-step=4.ckpt", large_batch=other)


def test_adopting_another_batch_scales_the_restored_rates_once(tmp_path: Path) -> None:
    def constant(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    train(tmp_path, module=Regression(scheduler=constant), large_batch=LargeBatch(8, base_batch_size=8))
    resumed = train(
        resume=tmp_path / "epoch=0-step=4.ckpt",
        module=Regression(scheduler=constant),
        large_batch=LargeBatch(32, base_batch_size=8, micro_batch_size=2, on_plan_change="adopt"),
        data=Batches(regression_data(64), 2),
    )
    assert resumed.rates == [pytest.approx(0.04)] * len(resumed.rates)
    assert resumed.rates


def test_adopting_follows_the_new_warm_up_too(tmp_path: Path) -> None:
    train(tmp_path)
    new = LargeBatch(8, base_batch_size=2, warmup_steps=6, on_plan_change="adopt")
    resumed = train(resume=tmp_path / "epoch=0-step=4.ckpt", large_batch=new)
    assert resumed.rates[:2] == pytest.approx([0.04 * 5 / 6, 0.04])


# ---- what Lightning leaves out


@pytest.mark.parametrize(("when", "told"), [("at the epoch's end", True), ("after the fit", False)])
def test_a_plateau_schedule_that_lightning_leaves_out_is_told(tmp_path: Path, when: str, told: bool) -> None:
    """ModelCheckpoint saves before Lightning steps ReduceLROnPlateau, which then never sees that epoch's metric."""

    class Watches(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = Lamb(self.named_parameters(), lr=0.02)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "watched"}}

        def on_train_epoch_end(self) -> None:
            self.log("watched", 1.0)

    saver = ModelCheckpoint(tmp_path, "saved")
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), saver], enable_checkpointing=True)
    trainer.fit(Watches(), datamodule=Batches(regression_data(SAMPLES), 2))
    if when == "after the fit":
        trainer.save_checkpoint(tmp_path / "saved.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = quiet_trainer(max_epochs=2, callbacks=[LargeBatch(8)])
        resumed.fit(Watches(), datamodule=Batches(regression_data(SAMPLES), 2), ckpt_path=tmp_path / "saved.ckpt")
    texts = [str(warning.message) for warning in caught if "may differ" in str(warning.message)]
    assert len(texts) == told
    assert all("does not step ReduceLROnPlateau (interval='epoch')" in text for text in texts)
