"""How many samples a micro-batch has: the user says it, or else the data does, once it is set up.

Data module, module and loader may each say something else, and change it in their ``setup``. An explicit
``micro_batch_size`` wins and is compared with what the loader gives; everything else is read after the last ``setup``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.errors import BatchSizeError, PromiseError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data

DATA, REST = regression_data(64), regression_data(48)


class OwnData(Regression):
    """A module that makes its own loader, and keeps what Lightning told it in configure_optimizers."""

    batch_size: Any
    loader_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.told: float = 0

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, self.loader_size)

    def configure_optimizers(self) -> Any:
        self.told = self.trainer.estimated_stepping_batches
        return Lamb(self.named_parameters(), lr=0.02)


class Divides(OwnData):
    """As Lightning's imagenet example: the batch of the node, divided among its devices in setup."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8

    def setup(self, stage: str) -> None:
        self.batch_size //= 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, self.batch_size)


class OfTheNode(LightningDataModule):
    """A data module whose batch_size is not what its loader gives."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 16

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, self.batch_size // 2)


def train(module: Any, large_batch: LargeBatch, data: Any = None, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": [large_batch]} | options))
    trainer.fit(module, **({} if data is None else data))
    return trainer


# ---- who tells


@pytest.mark.parametrize("explicit", [None, 4])
def test_a_batch_size_that_setup_divides_is_read_after_setup(explicit: int | None) -> None:
    """Lightning's imagenet example, under LargeBatch: 8 was taken, 4 came, and no value of micro_batch_size helped."""
    module = Divides()
    trainer = train(module, LargeBatch(16, micro_batch_size=explicit))
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (4, 4)
    assert module.micro_batches == [4] * 16


def test_an_explicit_value_wins_over_the_data_module_and_is_compared_with_the_loader() -> None:
    trainer = train(Regression(), LargeBatch(32, micro_batch_size=8), {"datamodule": OfTheNode()})
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (4, 2)
    for told in (None, 16):
        with pytest.raises(BatchSizeError, match=r"batches of 8.*Give LargeBatch\(micro_batch_size=8\)"):
            train(Regression(), LargeBatch(32, micro_batch_size=told), {"datamodule": OfTheNode()})
    with pytest.raises(BatchSizeError, match=r"micro_batch_size=8 \(given to LargeBatch\), but .* batches of 4"):
        train(Regression(), LargeBatch(16, micro_batch_size=8), {"train_dataloaders": DataLoader(DATA, 4)})


def property_of(size: int) -> OwnData:
    class WithProperty(OwnData):
        @property
        def batch_size(self) -> int:
            return size if self.trainer.training else 0

    return WithProperty()


def hparams_beside_another_attribute() -> OwnData:
    """An attribute and a hyper-parameter that differ tell nothing: the loader does."""

    class Both(OwnData):
        def __init__(self, batch_size: int = 32) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.batch_size = batch_size // 2

    return Both()


def of_numpy() -> OwnData:
    module = OwnData()
    module.batch_size = np.int64(4)
    return module


@pytest.mark.parametrize(
    "make",
    [OwnData, lambda: property_of(4), hparams_beside_another_attribute, of_numpy, Divides],
    ids=["attribute", "property", "hyper-parameter", "NumPy", "divided in setup"],  # addresses differ between processes
)
def test_wherever_the_micro_batch_is_from_lightnings_own_estimate_is_right(make: Any) -> None:
    """A loader made in the module: OneCycleLR was told 48 steps instead of 12, as if nothing were accumulated."""
    module = make()
    trainer = train(module, LargeBatch(16), max_epochs=3)
    assert module.told == trainer.global_step == 12
    assert trainer.accumulate_grad_batches == 4


def test_a_schedule_made_from_the_estimate_ends_with_the_training() -> None:
    class OneCycle(OwnData):
        def configure_optimizers(self) -> Any:
            optimizer = Lamb(self.named_parameters(), lr=0.02)
            cycle = torch_schedulers.OneCycleLR(optimizer, 0.02, self.trainer.estimated_stepping_batches)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    trainer = train(OneCycle(), LargeBatch(16), max_epochs=3)
    assert trainer.global_step == trainer.lr_scheduler_configs[0].scheduler.total_steps == 12


def test_a_setup_that_asks_early_gets_the_right_estimate_where_it_can() -> None:
    class AsksInSetup(Regression):
        def setup(self, stage: str) -> None:
            self.told = self.trainer.estimated_stepping_batches

    for data, explicit in (({"datamodule": Batches(DATA, 4)}, None), ({"train_dataloaders": DataLoader(DATA, 4)}, 4)):
        module = AsksInSetup()
        train(module, LargeBatch(16, micro_batch_size=explicit), data)
        assert module.told == 4


def test_zero_samples_and_no_number_at_all_are_not_taken_for_a_micro_batch() -> None:
    module = OwnData()
    module.batch_size = 0
    with pytest.raises(BatchSizeError, match=r"OwnData.batch_size=0 is no micro-batch"):
        train(module, LargeBatch(16))
    module = OwnData()
    module.batch_size = True
    assert train(module, LargeBatch(16)).accumulate_grad_batches == 4


# ---- several loaders


class SemiSupervised(Regression):
    def training_step(self, batch: dict[str, list[Tensor]], batch_idx: int) -> Tensor:
        return super().training_step(batch["labelled"], batch_idx) + self.net(batch["rest"][0]).square().mean()


@pytest.mark.parametrize("size", [4, 12, 16])
def test_of_several_loaders_one_or_all_may_be_the_micro_batch(size: int) -> None:
    """A semi-supervised loader of 4 and 12: all values but 4 were refused, and with 4 it was refused too."""
    loaders = CombinedLoader({"labelled": DataLoader(DATA, 4), "rest": DataLoader(REST, 12)}, "max_size_cycle")
    for exact in (True, False):
        large_batch = LargeBatch(48, micro_batch_size=size, exact_windows=exact)
        trainer = train(SemiSupervised(), large_batch, {"train_dataloaders": loaders})
        assert trainer.accumulate_grad_batches == 48 // size
        assert trainer.global_step == -(-16 * size // 48)


def test_a_loader_that_is_cycled_with_a_short_batch_is_named() -> None:
    """Its last batch is in the middle of the epoch, so windows would hold fewer samples than announced."""
    loaders = CombinedLoader({"labelled": DataLoader(DATA, 4), "rest": DataLoader(DATA, 12)}, "max_size_cycle")
    with pytest.raises(PromiseError, match=r"samples of optimizer step 1 .*announced 48, and it is 40.*drop_last=True"):
        train(SemiSupervised(), LargeBatch(48, micro_batch_size=12), {"train_dataloaders": loaders})


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_loaders_of_one_size_train_in_every_mode(mode: str) -> None:
    class First(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(next(part for part in batch if part is not None), batch_idx)

    loaders = CombinedLoader([DataLoader(DATA, 4), DataLoader(regression_data(32), 4)], mode)
    trainer = train(First(), LargeBatch(16), {"train_dataloaders": loaders})
    assert trainer.global_step == (2 if mode == "min_size" else 4)


@pytest.mark.parametrize("told", [None, 8])
def test_several_loaders_of_different_sizes_name_the_choices(told: int | None) -> None:
    loaders = CombinedLoader([DataLoader(DATA, 4), DataLoader(DATA, 12)], "min_size")
    with pytest.raises(BatchSizeError, match=r"\[4, 12\].*4, 12 \(that loader's samples\) or 16 \(all\)"):
        train(Regression(), LargeBatch(48, micro_batch_size=told), {"train_dataloaders": loaders})


@pytest.mark.parametrize("told", [None, 4])
def test_loaders_in_turn_are_refused_where_lightning_refuses_them(told: int | None) -> None:
    loaders = CombinedLoader([DataLoader(DATA, 4), DataLoader(DATA, 8)], "sequential")
    with pytest.raises(BatchSizeError, match=r"'sequential'.*ConcatDataset"):
        train(Regression(), LargeBatch(16, micro_batch_size=told), {"train_dataloaders": loaders})


# ---- batch sizes that change


def test_a_loader_that_is_reloaded_with_another_batch_size_is_refused() -> None:
    class Grows(LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(DATA, 4 * 2**self.trainer.current_epoch)

    module = Regression()
    with pytest.raises(BatchSizeError, match=r"epoch 1 gives batches of 8.*every_n_epochs=1.*stages=\[") as refusal:
        train(module, LargeBatch(16), {"datamodule": Grows()}, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert module.micro_batches == [4] * 16, refusal


def test_a_loader_that_is_reloaded_with_the_same_batch_size_trains() -> None:
    module = Regression()
    trainer = train(
        module, LargeBatch(16), {"datamodule": Batches(DATA, 4)}, max_epochs=3, reload_dataloaders_every_n_epochs=1
    )
    assert trainer.global_step == 12


def test_a_finder_of_batch_sizes_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BatchSizeError, match=r"BatchSizeFinder changes the micro-batch.*without LargeBatch"):
        train(Divides(), LargeBatch(16), callbacks=[LargeBatch(16), BatchSizeFinder()], default_root_dir=tmp_path)
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16)], default_root_dir=tmp_path)
    with pytest.raises(BatchSizeError, match=r"Tuner.scale_batch_size"):
        Tuner(trainer).scale_batch_size(Divides(), steps_per_trial=1, max_trials=1)


# ---- the moment after every setup


def test_nothing_is_left_on_strategy_or_module_nor_in_copies_of_it() -> None:
    class CopiesInSetup(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.copied = copy.deepcopy(pl_module)

    module, copying = Divides(), CopiesInSetup()
    trainer = train(module, LargeBatch(16), callbacks=[LargeBatch(16), copying, EMAWeightAveraging()])
    assert "barrier" not in vars(trainer.strategy)
    assert {"setup", "barrier"}.isdisjoint(vars(module)) and {"setup", "barrier"}.isdisjoint(vars(copying.copied))


@pytest.mark.parametrize("moment", ["module", "callback"])
def test_a_setup_that_fails_leaves_nothing_and_the_next_fit_is_right(moment: str) -> None:
    class Fails(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if moment == "callback" and failing:
                raise OSError("no data")

    class FailsOnce(Divides):
        def setup(self, stage: str) -> None:
            if moment == "module" and failing:
                raise OSError("no data")
            super().setup(stage)

    failing = True
    module = FailsOnce()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16), Fails()])
    with pytest.raises(OSError, match="no data"):
        trainer.fit(module)
    assert "barrier" not in vars(trainer.strategy)
    failing = False
    trainer.fit(module)
    assert (trainer.accumulate_grad_batches, trainer.global_step) == (4, 4)


def test_a_second_fit_with_other_data_and_a_compiled_module_read_their_own() -> None:
    large_batch = LargeBatch(16)
    trainer = train(OwnData(), large_batch)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Regression(), datamodule=Batches(DATA, 8))
    assert trainer.accumulate_grad_batches == 2
    compiled = torch.compile(Divides(), backend="eager")
    assert train(compiled, LargeBatch(16)).accumulate_grad_batches == 4


def test_a_setup_that_is_an_attribute_of_the_instance_is_called_as_ever() -> None:
    module = OwnData()
    calls: list[str] = []
    module.setup = lambda stage: calls.append(stage)
    train(module, LargeBatch(16))
    assert calls == ["fit"]
    assert "setup" in vars(module)
