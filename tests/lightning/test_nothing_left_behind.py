"""What LargeBatch puts into optimizers, Trainer and Python's warnings is gone after a ``fit``, also a failed one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_lamb import Lamb, LargeBatch
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data
from tests.optimizer.test_step_hooks import lookahead


class Fails(Regression):
    """Raises in a micro-batch; keeps its optimizer."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.one = at, Lamb(list(self.named_parameters()), lr=0.02)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == self.at:
            raise RuntimeError("on purpose")
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return self.one


def test_no_hook_stays_in_the_optimizer_after_a_fit_or_an_exception() -> None:
    for at in (None, 5):
        module = Fails(at)
        trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)])
        if at is None:
            trainer.fit(module, Batches(regression_data(32), 4))
        else:
            with pytest.raises(RuntimeError, match="on purpose"):
                trainer.fit(module, Batches(regression_data(32), 4))
        assert not module.one._optimizer_step_post_hooks


def test_a_failed_resume_leaves_the_filters_of_warnings_as_they_were(tmp_path: Path) -> None:
    data = Batches(regression_data(32), 4)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), save], enable_checkpointing=True).fit(Regression(), data)
    path = str(tmp_path / "epoch=0-step=2.ckpt")

    class BeforeTheFirst(Regression):
        def on_train_start(self) -> None:
            raise RuntimeError("on purpose")

    before = list(warnings.filters)
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)]).fit(BeforeTheFirst(), data, ckpt_path=path)
    ours = [entry for entry in warnings.filters if entry not in before and "resuming" in str(entry[1])]
    assert not ours


def test_a_callback_that_counted_samples_does_not_where_the_next_fit_forbids_it() -> None:
    """The window of an earlier ``fit`` stayed in force."""
    large_batch = LargeBatch(8)
    quiet_trainer(max_epochs=1, callbacks=[large_batch]).fit(Regression(), Batches(regression_data(32), 4))
    assert large_batch._window is not None
    large_batch.setup(quiet_trainer(max_epochs=1, callbacks=[large_batch]), Regression(), "fit")
    assert large_batch._window is None


@pytest.mark.parametrize("has_hooks", [True, False])
def test_an_optimizer_whose_steps_torch_does_not_report_trains_in_stages(has_hooks: bool) -> None:
    """Every step was taken for a skipped one, so that no stage ended; some such wrappers raised an AttributeError."""

    class Wrapped(Regression):
        def configure_optimizers(self) -> Any:
            return lookahead(torch.optim.SGD(self.parameters(), lr=0.1), has_hooks=has_hooks)

    stages = [{"global_batch_size": 4, "steps": 2}, {"global_batch_size": 8, "steps": 2}]
    large_batch = LargeBatch(stages=stages)
    module = Wrapped()
    trainer = quiet_trainer(callbacks=[large_batch])
    trainer.fit(module, Batches(regression_data(32), 4))
    assert trainer.global_step == 4
    assert len(module.micro_batches) == 2 + 4
    assert large_batch.stage == 1


class OfNumPy(Sampler):
    """Shuffles with a generator that is not torch's, under the name that torch's samplers use."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Any:
        return iter(self.generator.permutation(32).tolist())


def test_a_samplers_generator_that_is_not_torchs_is_left_alone() -> None:
    """It was asked for torch's initial_seed()."""
    after = []
    for callbacks in ([], [LargeBatch(8)]):
        sampler = OfNumPy()
        trainer = quiet_trainer(max_epochs=2, callbacks=callbacks)
        trainer.fit(Regression(), DataLoader(regression_data(32), 4, sampler=sampler))
        after.append(sampler.generator.permutation(32).tolist())
    assert after[0] == after[1]
