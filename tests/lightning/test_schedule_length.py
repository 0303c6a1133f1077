"""The length of a schedule that the mixin and the command line fill in is the number of steps that are made."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_lamb import LambMixin
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


class Model(LambMixin, Regression):
    """Warms up for a quarter of the training."""

    lamb_lr = 0.02
    lamb_schedule = {"warmup_fraction": 0.25}


def lengths(trainer: Any) -> tuple[int, int]:
    """(steps that were made, steps that the schedule was told)."""
    return trainer.global_step, trainer.lr_scheduler_configs[0].scheduler.total_steps


@pytest.mark.parametrize(
    ("scheduling", "options", "steps"),
    [
        ({0: 4}, {"max_epochs": 4}, 8),
        ({0: 1, 1: 3, 3: 8}, {"max_epochs": 4}, 8 + 3 + 3 + 1),
        ({2: 2}, {"max_epochs": 3}, 8 + 8 + 4),
        ({0: 4}, {"max_epochs": 4, "max_steps": 5}, 5),
        ({0: 4}, {"max_epochs": 4, "limit_train_batches": 5}, 8),
        ({0: 4}, {"max_epochs": 2, "limit_train_batches": 0.5}, 2),
    ],
)
def test_an_accumulation_that_changes_is_counted(
    scheduling: dict[int, int], options: dict[str, Any], steps: int
) -> None:
    """The schedule was told the steps without accumulation, and its rate was still high when training ended."""
    trainer = quiet_trainer(callbacks=[GradientAccumulationScheduler(scheduling)], **options)
    trainer.fit(Model(), datamodule=Batches(regression_data(32), 4))
    assert lengths(trainer) == (steps, steps)


@pytest.mark.parametrize("longer", ["epochs", "steps"])
def test_a_further_fit_gets_a_schedule_for_the_steps_that_are_left(longer: str) -> None:
    module, data = Model(), Batches(regression_data(32), 4)
    trainer = quiet_trainer(**({"max_epochs": 1} if longer == "epochs" else {"max_steps": 8, "max_epochs": -1}))
    trainer.fit(module, datamodule=data)
    assert lengths(trainer) == (8, 8)
    if longer == "epochs":
        trainer.fit_loop.max_epochs = 3
    else:
        trainer.fit_loop.epoch_loop.max_steps = 24
    trainer.fit(module, datamodule=data)
    assert lengths(trainer) == (24, 16)


def test_a_resumed_fit_keeps_the_whole_length(tmp_path: Any) -> None:
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Model(), datamodule=Batches(regression_data(32), 4))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    module = Model()
    module.lamb_schedule = {"warmup_fraction": 0.25, "on_plan_change": "adopt"}
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=Batches(regression_data(32), 4), ckpt_path=tmp_path / "saved.ckpt")
    assert lengths(trainer) == (24, 24)
