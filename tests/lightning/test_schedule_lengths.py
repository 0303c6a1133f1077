"""Lightning's estimate and our schedules' lengths, as seen in configure_optimizers, are the steps that are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LambMixin, LargeBatch, StagedWarmup
from lightning_lamb.errors import PlanError
from tests.distributed import run_ranks
from tests.lightning.rate_toys import Configured, fit
from tests.lightning.test_resume import StatefulData
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data


class OneCycle(Regression):
    """Asks Lightning for the length, as its documentation says."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    def configure_optimizers(self) -> Any:
        self.told = self.trainer.estimated_stepping_batches
        optimizer = Lamb(self.named_parameters(), lr=0.02)
        scheduler = torch_schedulers.OneCycleLR(optimizer, 0.02, int(self.told))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OwnLoader(OneCycle):
    """Makes its dataloader itself."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(regression_data(40), 4)


def combined(mode: str) -> CombinedLoader:
    return CombinedLoader({"a": DataLoader(regression_data(40), 4), "b": DataLoader(regression_data(24), 4)}, mode)


@pytest.mark.parametrize(
    ("module", "data", "options"),
    [
        (OwnLoader, {}, {}),
        (OneCycle, {"train_dataloaders": DataLoader(regression_data(40), 4)}, {}),
        (OneCycle, {"datamodule": Batches(regression_data(40), 4)}, {}),
        (OneCycle, {"train_dataloaders": combined("max_size_cycle")}, {}),
        (OneCycle, {"train_dataloaders": combined("min_size")}, {}),
        (OwnLoader, {}, {"limit_train_batches": 7}),
        (OwnLoader, {}, {"limit_train_batches": 0.5}),
        (OwnLoader, {}, {"max_steps": 5}),
    ],
    ids=["module", "handed to fit", "data module", "max_size_cycle", "min_size", "limit 7", "limit 0.5", "max_steps"],
)
def test_the_estimate_in_configure_optimizers_is_the_number_of_steps(module: Any, data: Any, options: Any) -> None:
    """With a loader made in the module OneCycleLR was told 48 steps and got 12."""
    model = module()
    micro = 4 if "train_dataloaders" in data and isinstance(data["train_dataloaders"], CombinedLoader) else None
    large_batch = LargeBatch(16, micro_batch_size=micro, exact_windows=micro is None)
    trainer = quiet_trainer(max_epochs=3, callbacks=[large_batch, Recorder()], **options)
    trainer.fit(model, **data)
    assert model.told == trainer.global_step > 0
    assert model.rates[-1] < 1e-6  # came down to its end


def on_a_rank(module: type[OneCycle]) -> dict[str, Any]:
    model = module()
    trainer = quiet_trainer(max_epochs=3, devices=2, strategy="ddp", callbacks=[LargeBatch(16)])
    trainer.fit(model, **({} if module is OwnLoader else {"train_dataloaders": DataLoader(regression_data(40), 4)}))
    return {"told": model.told, "steps": trainer.global_step}


@pytest.mark.parametrize("module", [OwnLoader, OneCycle])
def test_the_estimate_is_right_on_two_ranks(module: type[OneCycle]) -> None:
    for result in run_ranks(on_a_rank, 2, module, init_group=False):
        assert result["told"] == result["steps"] == 9  # 40 samples: two windows of 16 and a short one, 3 epochs


class Mixin(LambMixin, Regression):
    lamb_schedule = {"warmup_fraction": 0.25}


@pytest.mark.parametrize("scheduling", [{0: 4}, {0: 1, 2: 4}, {1: 3}])
def test_beside_an_accumulation_scheduler_the_mixins_schedule_has_the_trainings_length(scheduling: Any) -> None:
    """The schedule had 64 steps and the training 16."""
    model = Mixin()
    trainer = quiet_trainer(max_epochs=4, callbacks=[GradientAccumulationScheduler(scheduling)])
    trainer.fit(model, Batches(regression_data(32), 4))
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == trainer.global_step
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0


class Ordered(LambMixin, Regression):
    """Notes which micro-batches it gets."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.lamb_schedule = schedule
        self.first: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first.append(float(batch[0].flatten()[0]))
        return super().training_step(batch, batch_idx)


def test_asking_for_the_length_does_not_cost_the_mixin_its_position_in_the_data(tmp_path: Path) -> None:
    """With a schedule, a stateful loader began its epoch anew on resume (Lightning #20550)."""
    order = {}
    for name, schedule in (("without", None), ("with", {"warmup_fraction": 0.25})):
        every = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(max_epochs=1, callbacks=[every], enable_checkpointing=True)
        trainer.fit(Ordered(schedule), datamodule=StatefulData())
        model = Ordered(schedule)
        checkpoint = tmp_path / name / "step=3.ckpt"
        quiet_trainer(max_epochs=1).fit(model, datamodule=StatefulData(), ckpt_path=checkpoint)
        order[name] = model.first
    assert order["with"] == order["without"]
    assert order["with"]


@pytest.mark.parametrize("callbacks", [[], [LargeBatch(8)]], ids=["LambMixin", "LargeBatch"])
def test_a_longer_training_on_resume_speaks_of_its_length(tmp_path: Path, callbacks: Any) -> None:
    """The message spoke of `stages[0].steps` to somebody who had written no stage."""
    saved = tmp_path / "saved.ckpt"
    fit(Mixin(), *callbacks).save_checkpoint(saved)
    with pytest.raises(PlanError) as error:
        fit(Mixin(), *callbacks, max_epochs=2, checkpoint=saved)
    assert "stages" not in str(error.value).replace("these stages", "")
    assert "total_steps:" in str(error.value)
    assert "max_epochs" in str(error.value)


def test_a_second_fit_of_the_same_trainer_gets_a_schedule_for_what_is_left() -> None:
    model = Configured(lambda optimizer: StagedWarmup(optimizer), interval="step")
    trainer = fit(model, LargeBatch(8))
    trainer.fit_loop.max_epochs = 3
    model.rates.clear()
    trainer.fit(model, datamodule=Batches(regression_data(32), 4))
    assert model.rates == pytest.approx([0.02 * (1 - step / 8) for step in range(8)])
