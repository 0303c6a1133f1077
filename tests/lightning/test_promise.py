"""What LargeBatch announced is what trains, or it says so: the check itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_lamb import LargeBatch
from lightning_lamb.callbacks import report_count
from lightning_lamb.callbacks.promise import Promise
from lightning_lamb.errors import InvalidOptionError, PromiseError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data

DIFFERENCE = ("learning rate of group 0", 0.25, 0.5, "a callback", "Remove it.")


def test_a_difference_names_the_number_its_cause_and_the_remedy() -> None:
    message = (
        r"learning rate of group 0: LargeBatch announced 0.25, and it is 0.5. Most likely changed by a callback. "
        r"Remove it. \(LargeBatch\(check="
    )
    with pytest.raises(PromiseError, match=message):
        Promise("error").compare(*DIFFERENCE)


def test_warn_tells_once_per_number_and_stage() -> None:
    promise = Promise("warn")
    for stage in range(2):
        with pytest.warns(UserWarning, match="learning rate of group 0"):
            promise.compare(*DIFFERENCE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            promise.compare(*DIFFERENCE)
        promise.begin()
        assert promise.is_first_window, stage


def test_off_and_equal_numbers_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Promise("off").compare(*DIFFERENCE)
        Promise("error").compare("samples", 8, 8, "nobody", "")


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="check='always' is not one of: error, warn, off"):
        LargeBatch(8, check="always")  # type: ignore[arg-type]


class SetsAccumulation(Callback):
    """Somebody who also decides about the accumulation."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            trainer.accumulate_grad_batches = 1


def test_an_accumulation_that_somebody_changed_is_told() -> None:
    message = r"accumulate_grad_batches: LargeBatch announced 2, and it is 1.*SetsAccumulation, whose code"
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), SetsAccumulation()])
    with pytest.raises(PromiseError, match=message):
        trainer.fit(Regression(), Batches(regression_data(32), 4))
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8, check="warn"), SetsAccumulation()])
    with pytest.warns(UserWarning, match=message):
        trainer.fit(Regression(), Batches(regression_data(32), 4))


class HalfOf:
    """Its batches have half the samples that it says."""

    batch_size = 4

    def __init__(self, samples: int) -> None:
        self.loader = DataLoader(regression_data(samples), 2)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(self.loader)


def test_a_loader_whose_batches_are_smaller_than_it_says_is_told_in_the_first_window() -> None:
    """The global batch was half of what was announced, silently."""
    module = Regression()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)])
    message = r"samples of optimizer step 0 \(epoch 0\) on this rank: LargeBatch announced 8, and it is 4"
    with pytest.raises(PromiseError, match=message):
        trainer.fit(module, HalfOf(32))
    assert len(module.micro_batches) == 2  # before the first step
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8, check="off")])
    trainer.fit(Regression(), HalfOf(32))


def test_a_short_window_at_an_epochs_end_and_reported_counts_are_no_false_alarm() -> None:
    class Reports(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            report_count(self, 3 + batch_idx)
            return super().training_step(batch, batch_idx)

    for module, samples in ((Regression(), 12), (Regression(), 6), (Reports(), 32)):
        trainer = quiet_trainer(max_epochs=2, callbacks=[LargeBatch(8)])
        trainer.fit(module, Batches(regression_data(samples), 4))
        assert trainer.global_step > 0


def test_a_micro_batch_that_training_step_leaves_out_is_no_false_alarm() -> None:
    """None from training_step asks Lightning to leave a micro-batch out; the mean is over the others."""

    class LeavesOut(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 0 else loss

    module = LeavesOut()
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)])
    trainer.fit(module, Batches(regression_data(32), 4))
    assert trainer.global_step == 4
