"""Learning rates after a resume, and the check that finds those that are not as announced."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from torch.optim import lr_scheduler as torch_schedulers

from lightning_lamb import LargeBatch, StagedWarmup
from lightning_lamb.errors import PlanError, PromiseError
from tests.lightning.rate_toys import HALVING, Configured, Watches, fit

# ---- resuming


def saved_by(tmp_path: Path, module: Any, *callbacks: Any, **options: Any) -> Path:
    trainer = fit(module, *callbacks, **options)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    return tmp_path / "saved.ckpt"


@pytest.mark.parametrize("scheduler", [None, HALVING], ids=["constant", "ExponentialLR"])
def test_a_checkpoint_from_a_run_without_large_batch_is_refused_or_trains_as_announced(
    tmp_path: Path, scheduler: Any
) -> None:
    """0.04 was announced and 0.02 trained, silently."""
    plain = saved_by(tmp_path, Configured(scheduler), accumulate_grad_batches=4)
    with pytest.raises(PlanError, match=r"learning rate of group 0: 0.02 in the checkpoint, 0.04 now \(0.02 x 2\)"):
        fit(Configured(scheduler), LargeBatch(16, base_batch_size=4), checkpoint=plain, max_epochs=2)
    module, large_batch = Configured(scheduler), LargeBatch(16, base_batch_size=4, on_plan_change="adopt")
    fit(module, large_batch, checkpoint=plain, max_epochs=2)
    assert large_batch.derived.learning_rates == pytest.approx([0.04])
    assert module.rates == pytest.approx([0.04 if scheduler is None else 0.02] * 2)


def test_a_checkpoint_from_a_run_without_large_batch_at_the_same_rate_goes_on(tmp_path: Path) -> None:
    plain = saved_by(tmp_path, Configured(), accumulate_grad_batches=4)
    module = Configured()
    fit(module, LargeBatch(16), checkpoint=plain, max_epochs=2)
    assert module.rates == pytest.approx([0.02] * 2)


def test_a_schedule_that_the_checkpoint_knows_nothing_of_goes_on_at_its_step_or_is_refused(tmp_path: Path) -> None:
    plain = saved_by(tmp_path, Configured(), accumulate_grad_batches=4)
    options = {"global_batch_size": 16, "base_batch_size": 16, "warmup_steps": 1}
    with pytest.raises(PlanError, match="schedule: no StagedWarmup in the checkpoint, one now"):
        fit(Configured(), LargeBatch(**options), checkpoint=plain, max_epochs=2)
    module = Configured()
    fit(module, LargeBatch(**options, on_plan_change="adopt"), checkpoint=plain, max_epochs=2)
    assert module.rates == pytest.approx([0.02 * (1 - 2 / 4), 0.02 * (1 - 3 / 4)])


@pytest.mark.parametrize("scheduler", [None, HALVING], ids=["constant", "ExponentialLR"])
@pytest.mark.parametrize("same_module", [False, True])
def test_another_learning_rate_on_resume_is_refused_or_trains(
    tmp_path: Path, scheduler: Any, same_module: bool
) -> None:
    """lamb_lr went from 0.01 to 0.002: 0.002 was announced and 0.01 trained, whatever on_plan_change said."""
    saved = saved_by(tmp_path, Configured(scheduler), LargeBatch(16, base_batch_size=4))
    with pytest.raises(PlanError, match=r"group 0: 0.04 in the checkpoint, 0.004 now \(0.002 x 2\)"):
        fit(Configured(scheduler, lr=0.002), LargeBatch(16, base_batch_size=4), checkpoint=saved, max_epochs=2)
    module = Configured(scheduler, lr=0.002)
    fit(module, LargeBatch(16, base_batch_size=4, on_plan_change="adopt"), checkpoint=saved, max_epochs=2)
    assert module.rates == pytest.approx([0.004 if scheduler is None else 0.002] * 2)


@pytest.mark.parametrize("way", ["adopt", "rewarm"])
def test_another_base_lr_on_resume_trains_with_it(tmp_path: Path, way: Any) -> None:
    """With on_plan_change="adopt" and base_lr 0.02 -> 0.001 the old rate went on."""
    options = {"global_batch_size": 16, "base_batch_size": 4, "warmup_steps": 1}
    saved = saved_by(tmp_path, Configured(), LargeBatch(**options, base_lr=0.02))
    module = Configured()
    fit(module, LargeBatch(**options, base_lr=0.001, on_plan_change=way), checkpoint=saved, max_epochs=2)
    expected = [0.002 * (1 - 2 / 4), 0.002 * (1 - 3 / 4)] if way == "adopt" else [0.002, 0.002 * (1 - 1 / 2)]
    assert module.rates == pytest.approx(expected)


def test_rewarm_without_a_schedule_that_can_is_refused_for_another_rate_too(tmp_path: Path) -> None:
    saved = saved_by(tmp_path, Configured(), LargeBatch(16))
    with pytest.raises(PlanError, match="needs a schedule that can warm up again"):
        fit(Configured(lr=0.002), LargeBatch(16, on_plan_change="rewarm"), checkpoint=saved, max_epochs=2)


def test_a_rate_that_reduce_on_plateau_had_reduced_goes_on_reduced(tmp_path: Path) -> None:
    make = lambda optimizer: torch_schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    saved = saved_by(tmp_path, Watches(make, monitor="watched"), LargeBatch(16, base_batch_size=4), max_epochs=3)
    module = Watches(make, monitor="watched")
    fit(module, LargeBatch(16, base_batch_size=4), checkpoint=saved, max_epochs=4)
    assert module.rates == pytest.approx([0.01] * 2)


# ---- the check of the promise


class SetsRate(Callback):
    """Somebody who also sets the learning rate."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self.step:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.123


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("scheduler", [None, HALVING, lambda o: StagedWarmup(o, warmup_steps=2)])
def test_a_rate_that_somebody_changed_is_told_at_its_step(step: int, scheduler: Any) -> None:
    module = Configured(scheduler, interval="step")
    message = rf"learning rate of group 0 at optimizer step {step}: .* it is 0.123.* a callback, the module's own code"
    with pytest.raises(PromiseError, match=message):
        fit(module, LargeBatch(8), SetsRate(step))
    with pytest.warns(UserWarning, match=message) as told:
        fit(Configured(scheduler, interval="step"), LargeBatch(8, check="warn"), SetsRate(step))
    assert sum("LargeBatch announced" in str(one.message) for one in told) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*LargeBatch announced.*")
        fit(Configured(scheduler, interval="step"), LargeBatch(8, check="off"), SetsRate(step))


def test_several_schedulers_on_one_optimizer_are_no_false_alarm() -> None:
    class Both(Watches):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(list(self.named_parameters()))
            plateau = torch_schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return [optimizer], [
                {"scheduler": torch_schedulers.ExponentialLR(optimizer, 0.9), "interval": "step"},
                {"scheduler": plateau, "monitor": "watched"},
            ]

    fit(Both(), LargeBatch(8), max_epochs=4)


@pytest.mark.parametrize("told", [5, 48])
def test_a_schedule_of_another_length_than_the_training_is_told_before_the_first_step(told: int) -> None:
    module = Configured(lambda o: torch_schedulers.OneCycleLR(o, 0.1, told), interval="step")
    message = rf"length of OneCycleLR in optimizer steps: LargeBatch announced 8, and it is {told}"
    with pytest.raises(PromiseError, match=message):
        fit(module, LargeBatch(8), max_epochs=2)
    assert module.rates == []


def test_a_schedule_of_the_trainings_length_is_no_false_alarm() -> None:
    for config in ({"interval": "step"}, {"interval": "epoch"}):
        length = 8 if config["interval"] == "step" else 2
        fit(Configured(lambda o: torch_schedulers.OneCycleLR(o, 0.1, length), **config), LargeBatch(8), max_epochs=2)


def test_a_staged_warmup_that_has_run_out_before_the_training_is_told_once() -> None:
    with pytest.warns(UserWarning, match=r"ends after 3 optimizer steps, and the training makes 8") as told:
        fit(Configured(lambda o: StagedWarmup(o, total_steps=3)), LargeBatch(8), max_epochs=2)
    assert sum("StagedWarmup ends" in str(one.message) for one in told) == 1
