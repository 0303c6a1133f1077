"""The number of steps that LargeBatch announces is the number it takes, whatever limits the Trainer or the data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_lamb import LargeBatch
from lightning_lamb.errors import BatchSizeError, PlanError
from tests.lightning.toys import Regression, quiet_trainer, regression_data

DATA = regression_data(64)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        yield from DATA


class KnownStream(Stream):
    def __len__(self) -> int:
        return 64


class FirstPart(Regression):
    """Trains on the first batch there is, and keeps what the accumulation was when the model was configured."""

    def configure_model(self) -> None:
        self.known = self.trainer.accumulate_grad_batches

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = [batch] if isinstance(batch[0], Tensor) else batch
        return super().training_step(next(part for part in parts if part is not None), batch_idx)


def plain() -> Any:
    return DataLoader(DATA, 4)


@pytest.mark.parametrize(
    ("options", "loader", "steps"),
    [
        ({}, plain, 8),
        ({"limit_train_batches": 0.5}, plain, 4),
        ({"limit_train_batches": 6}, plain, 4),
        ({"overfit_batches": 0.5}, plain, 4),
        ({"overfit_batches": 5}, plain, 4),
        ({"fast_dev_run": True}, plain, 1),
        ({"fast_dev_run": 9}, plain, 3),
        ({"max_steps": 5}, plain, 5),
        ({"max_steps": 99}, plain, 8),
        ({"max_epochs": -1, "max_steps": 9}, plain, 9),
        ({}, lambda: DataLoader(KnownStream(), 4), 8),
        ({"limit_train_batches": 6}, lambda: DataLoader(Stream(), 4), 4),
        ({"max_epochs": -1, "max_steps": 6}, lambda: DataLoader(Stream(), 4), 6),
        ({"val_check_interval": 3}, plain, 8),
        ({}, lambda: CombinedLoader([plain(), DataLoader(regression_data(32), 4)], "min_size"), 4),
        ({}, lambda: CombinedLoader([plain(), DataLoader(regression_data(32), 4)], "max_size"), 8),
        ({}, lambda: [DataLoader(regression_data(32), 4), plain()], 8),
    ],
)
def test_the_announced_steps_are_taken(options: dict[str, Any], loader: Any, steps: int) -> None:
    large_batch, module = LargeBatch(16, warmup_steps=1), FirstPart()
    trainer = quiet_trainer(**{"max_epochs": 2, "callbacks": [large_batch]} | options)
    trainer.fit(module, loader())
    assert large_batch.derived.total_steps == trainer.global_step == steps
    assert module.known == 4
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == steps


def test_what_has_no_length_is_asked_for_one_only_where_it_matters() -> None:
    def run(large_batch: LargeBatch, loader: Any, **options: Any) -> Any:
        trainer = quiet_trainer(callbacks=[large_batch], **options)
        trainer.fit(Regression(), loader)
        return trainer

    assert run(LargeBatch(16), DataLoader(Stream(), 4), max_epochs=2).global_step == 8
    with pytest.raises(PlanError, match="no length"):
        run(LargeBatch(16, warmup_steps=1), DataLoader(Stream(), 4), max_epochs=2)
    with pytest.raises(PlanError, match="trains without end"):
        run(LargeBatch(16, warmup_steps=1), plain(), max_time={"seconds": 9})
    assert run(LargeBatch(16), plain(), max_time={"seconds": 0.3}).global_step > 0
    with pytest.raises(BatchSizeError, match="an epoch has 2 per rank"):
        run(LargeBatch(16), plain(), max_epochs=1, overfit_batches=2)


def test_a_loader_of_single_samples_is_a_micro_batch_of_one() -> None:
    class Single(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([part[None] for part in batch], batch_idx)

    large_batch = LargeBatch(16, micro_batch_size=1)
    trainer = quiet_trainer(max_epochs=1, callbacks=[large_batch])
    trainer.fit(Single(), DataLoader(DATA, batch_size=None))
    assert (trainer.global_step, trainer.accumulate_grad_batches) == (4, 16)
