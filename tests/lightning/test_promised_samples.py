"""Every window holds the samples that were announced, in so many micro-batches, or an error names who changed that."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_lamb import LargeBatch
from lightning_lamb.callbacks import report_count
from lightning_lamb.errors import BatchSizeError, PromiseError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data

DATA = regression_data(64)


def train(data: Any, large_batch: LargeBatch, module: Any = None, *callbacks: Callback, **options: Any) -> Any:
    module = module or Regression()
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": [large_batch, *callbacks]} | options))
    trainer.fit(module, data)
    return trainer, module


class Varying:
    """A batch sampler whose third window of two is short: 3 and 5 samples, or 4 and 4, then 4 and 4, then 2 and 4."""

    def __init__(self, first: int = 3) -> None:
        self.sizes = (first, 8 - first, 4, 4, 2, 4, 4, 4)

    def __iter__(self) -> Iterator[list[int]]:
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size

    def __len__(self) -> int:
        return 8


# ---- samples


@pytest.mark.parametrize("exact", [True, False])
def test_batches_that_vary_are_named_where_a_window_differs(exact: bool) -> None:
    loader = DataLoader(DATA, batch_sampler=Varying(4))
    message = r"samples of optimizer step 2 \(epoch 0\).* announced 8, and it is 6\..*batch sampler"
    module = Regression()
    with pytest.raises(PromiseError, match=message):
        train(loader, LargeBatch(8, micro_batch_size=4, exact_windows=exact), module)


def test_more_than_the_micro_batch_is_refused_before_it_is_trained_on() -> None:
    module = Regression()
    with pytest.raises(BatchSizeError, match="5 samples"):
        train(DataLoader(DATA, batch_sampler=Varying()), LargeBatch(8, micro_batch_size=4), module)
    assert max(module.micro_batches[:-1]) == 3


def test_a_warning_trains_on_and_is_told_once() -> None:
    large_batch = LargeBatch(8, micro_batch_size=4, exact_windows=False, check="warn")
    with pytest.warns(UserWarning, match="samples of optimizer step 2") as told:
        trainer, _ = train(DataLoader(DATA, batch_sampler=Varying(4)), large_batch, max_epochs=2)
    assert trainer.global_step == 8
    assert len([warning for warning in told if "samples of optimizer step" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*samples of optimizer step.*")
        off = LargeBatch(8, micro_batch_size=4, exact_windows=False, check="off")
        assert train(DataLoader(DATA, batch_sampler=Varying()), off)[0].global_step == 4


def test_the_last_window_of_an_epoch_may_be_short() -> None:
    for samples, steps in ((64, 4), (60, 4), (63, 4), (17, 2)):
        trainer, module = train(DataLoader(regression_data(samples), 4), LargeBatch(16), max_epochs=2)
        assert trainer.global_step == 2 * steps
        assert sum(module.micro_batches) == 2 * samples


class OfWorkers(IterableDataset):
    """Two workers with 10 and 14 samples: short batches in the middle of the epoch."""

    def __iter__(self) -> Iterator[Any]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info().id
        yield from (DATA[index] for index in (range(10) if worker == 0 else range(10, 24)))


def test_short_batches_of_workers_are_named_with_the_remedy() -> None:
    with pytest.raises(PromiseError, match=r"announced 8, and it is 6.*drop_last=True"):
        train(DataLoader(OfWorkers(), 4, num_workers=2), LargeBatch(8))
    trainer, _ = train(DataLoader(OfWorkers(), 4, num_workers=2, drop_last=True), LargeBatch(8))
    assert trainer.global_step == 3


def test_reported_counts_are_counted_instead_of_samples() -> None:
    class Reports(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            report_count(self, len(batch[0]) * 7)
            return super().training_step(batch, batch_idx)

    trainer, _ = train(DataLoader(DATA, batch_sampler=Varying()), LargeBatch(8, micro_batch_size=4), Reports())
    assert trainer.global_step == 4


def test_a_training_step_that_skips_a_batch_takes_no_samples_away() -> None:
    class Skips(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx in (0, 5, 8, 9, 10, 11) else super().training_step(batch, batch_idx)

    trainer, _ = train(DataLoader(DATA, 4), LargeBatch(16), Skips())
    assert trainer.global_step == 4


def test_a_loader_that_gives_none_for_a_batch_is_named() -> None:
    """Lightning counts such a batch and does not step on it: the window goes on into the next."""

    def collate(samples: list[Any]) -> Any:
        return None if float(samples[0][0][0]) == float(DATA[4][0][0]) else default_collate(samples)

    with pytest.raises(PromiseError, match=r"micro-batches of optimizer step 0.*announced 2, and it is 3.*None"):
        train(DataLoader(DATA, 4, collate_fn=collate), LargeBatch(8))


# ---- accumulation


class GrowsAccumulation(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.accumulate_grad_batches = 2


class SetsByName(Callback):
    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        setattr(trainer, "accumulate_grad_batches", 2)


class InTheModule(Regression):
    def on_train_epoch_start(self) -> None:
        self.trainer.accumulate_grad_batches *= 2


@pytest.mark.parametrize(
    ("module", "callback", "name"),
    [
        (None, GrowsAccumulation(), "GrowsAccumulation, whose code assigns it"),
        (None, SetsByName(), "SetsByName, whose code assigns it"),
        (InTheModule(), None, "InTheModule, whose code assigns it"),
    ],
)
def test_who_changes_the_accumulation_is_named(module: Any, callback: Callback | None, name: str) -> None:
    with pytest.raises(PromiseError, match=rf"accumulate_grad_batches: .*announced 4, .*changed by {re.escape(name)}"):
        train(DataLoader(DATA, 4), LargeBatch(16), module, *([callback] if callback else []), max_epochs=2)


# ---- after a resume


@pytest.mark.parametrize("exact", [True, False])
def test_windows_are_whole_after_a_resume_from_inside_one(tmp_path: Path, exact: bool) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, train_time_interval=None, every_n_train_steps=1)
    train(DataLoader(DATA, 4), LargeBatch(16), None, saver, enable_checkpointing=True)

    class InsideAWindow(Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            if trainer.fit_loop.batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    train(DataLoader(DATA, 4), LargeBatch(16, exact_resume=exact), None, InsideAWindow())
    for name in ("step=2.ckpt", "inside.ckpt"):
        module = Regression()
        trainer = quiet_trainer(max_epochs=2, callbacks=[LargeBatch(16, exact_resume=exact)])
        trainer.fit(module, DataLoader(DATA, 4), ckpt_path=str(tmp_path / name))
        assert trainer.global_step == 8


def test_the_data_module_that_declares_its_batch_is_compared_too() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16)])
    trainer.fit(Regression(), datamodule=Batches(DATA, 4))
    assert trainer.global_step == 4
