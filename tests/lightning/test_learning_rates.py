"""The announced learning rate is the one that trains: beside other fits, finders, checkpoints and schedulers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim import lr_scheduler as torch_schedulers

from lightning_lamb import Lamb, LambMixin, LargeBatch
from lightning_lamb.callbacks.scheduler_scaling import refuse_unscalable
from lightning_lamb.errors import ConflictError, InvalidOptionError
from tests.lightning.rate_toys import Configured, Watches, fit
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data


class Keeps(Regression):
    """Gives every fit the same optimizer, and scheduler, as the stock LightningCLI does."""

    def __init__(self, **kind: Any) -> None:
        super().__init__(**kind)
        self.kept: Any = None

    def configure_optimizers(self) -> Any:
        self.kept = self.kept or super().configure_optimizers()
        return self.kept


# ---- a second fit


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"base_batch_size": 4}, 0.04), ({"base_batch_size": 4, "base_lr": 0.001}, 0.002)],
)
@pytest.mark.parametrize("scheduler", [None, lambda o: torch_schedulers.ConstantLR(o, 1.0)])
def test_a_kept_optimizer_is_scaled_once_however_many_fits(options: Any, expected: float, scheduler: Any) -> None:
    """The second fit doubled 0.02 to 0.04; with base_lr it went from 0.002 to 0.0004."""
    module, large_batch = Keeps(scheduler=scheduler), LargeBatch(16, **options)
    for _ in range(3):
        fit(module, large_batch)
        assert large_batch.derived.learning_rates == pytest.approx([expected])
    assert module.rates == pytest.approx([expected] * 6)


def test_another_batch_in_the_second_fit_scales_the_optimizers_own_rate() -> None:
    module = Keeps()
    fit(module, LargeBatch(16, base_batch_size=4))
    fit(module, LargeBatch(4, base_batch_size=4))
    assert module.rates == pytest.approx([0.04] * 2 + [0.02] * 8)


@pytest.mark.parametrize("made", ["float", "tensor"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"warmup_steps": 1}, {"warmup_steps": 1}, [0.04, 0.02]),
        ({"warmup_steps": 1}, {}, [0.04, 0.04]),
        ({}, {"warmup_steps": 1}, [0.04, 0.02]),
        ({"warmup_steps": 1}, {"base_lr": 0.001}, [0.002, 0.002]),
        ({"warmup_steps": 1}, {"base_lr": 0.001, "warmup_steps": 1}, [0.002, 0.001]),
    ],
)
def test_a_schedule_that_large_batch_added_to_the_fit_before_leaves_nothing(
    first: dict[str, Any], second: dict[str, Any], expected: list[float], made: str
) -> None:
    """With a warm-up in both fits 0.04 became 0.08; without one in the second, it trained at the 0 that was left."""
    given = 0.02 if made == "float" else torch.tensor(0.02)
    module = Keeps(optimizer=lambda named: Lamb(named, lr=given))
    fit(module, LargeBatch(16, base_batch_size=4, **first))
    fit(module, LargeBatch(16, base_batch_size=4, **second))
    assert [float(rate) for rate in module.rates[2:]] == pytest.approx(expected)


def test_what_a_users_schedule_left_is_not_scaled_again_in_a_fit_without_one() -> None:
    """0.02, to which a schedule of the module's had halved 0.04, became 0.04."""
    module = Keeps()
    module.make_scheduler = lambda optimizer: torch_schedulers.ExponentialLR(optimizer, 0.5)
    fit(module, LargeBatch(16, base_batch_size=4))
    module.kept = module.kept[0][0]
    fit(module, LargeBatch(16, base_batch_size=4))
    assert module.rates == pytest.approx([0.04, 0.04, 0.02, 0.02])


def test_a_rate_that_the_user_gave_a_kept_optimizer_since_is_scaled_as_its_own() -> None:
    module = Keeps()
    fit(module, LargeBatch(16, base_batch_size=4))
    module.kept.param_groups[0]["lr"] = 0.01
    fit(module, LargeBatch(16, base_batch_size=4))
    assert module.rates == pytest.approx([0.04] * 2 + [0.02] * 2)


def test_a_shared_tensor_rate_is_neither_scaled_in_place_nor_scheduled_in_place_by_large_batch() -> None:
    """The user's tensor was zeroed by the schedule's end, and the second model of the class trained at 0."""
    given = torch.tensor(0.02)
    for _ in range(2):
        module = Regression(optimizer=lambda named: Lamb(named, lr=given))
        large_batch = LargeBatch(16, base_batch_size=4)
        fit(module, large_batch)
        assert module.rates == pytest.approx([0.04] * 2)
        assert float(given) == pytest.approx(0.02)


# ---- finders


class Searched(LambMixin, Regression):
    """Its rate may be found."""

    lamb_lr = 0.02


def finder() -> LearningRateFinder:
    return LearningRateFinder(1e-4, 0.1, 30, early_stop_threshold=None, attr_name="lamb_lr")


@pytest.mark.parametrize(
    "large_batch",
    [
        lambda: LargeBatch(16, base_batch_size=4),
        lambda: LargeBatch(16, base_batch_size=16, base_lr=0.1),
        lambda: LargeBatch(16, warmup_steps=2),
        lambda: LargeBatch(stages=[{"global_batch_size": 8, "steps": 2}], micro_batch_size=4),
    ],
)
def test_a_finder_beside_a_large_batch_that_sets_rates_is_refused(large_batch: Any, tmp_path: Path) -> None:
    """The suggestion was scaled twice: 0.00067 became 0.0027, and the summary said 0.0013."""
    with pytest.raises(ConflictError, match=r"LearningRateFinder .* belongs to the global batch"):
        fit(Searched(), large_batch(), finder(), default_root_dir=tmp_path)
    trainer = quiet_trainer(max_epochs=1, callbacks=[large_batch()], default_root_dir=tmp_path)
    with pytest.raises(ConflictError, match="LearningRateFinder"):
        Tuner(trainer).lr_find(Searched(), Batches(regression_data(32), 4), attr_name="lamb_lr", num_training=8)


def test_beside_a_large_batch_that_leaves_rates_alone_the_suggestion_trains(tmp_path: Path) -> None:
    module, large_batch = Searched(), LargeBatch(16)
    fit(module, large_batch, finder(), max_epochs=20, default_root_dir=tmp_path)
    assert module.lamb_lr != 0.02
    assert large_batch.derived.learning_rates[0] == module.lamb_lr == module.rates[-1]


def test_the_tuner_searches_at_the_global_batch_and_its_suggestion_trains(tmp_path: Path) -> None:
    module, large_batch = Searched(), LargeBatch(16)
    trainer = quiet_trainer(max_epochs=20, callbacks=[large_batch, Recorder()], default_root_dir=tmp_path)
    data = Batches(regression_data(32), 4)
    search = {"attr_name": "lamb_lr", "num_training": 30, "min_lr": 1e-4, "max_lr": 0.1, "early_stop_threshold": None}
    Tuner(trainer).lr_find(module, data, **search)
    assert trainer.accumulate_grad_batches == 4
    module.rates.clear()
    trainer.fit(module, data)
    assert module.lamb_lr != 0.02
    assert set(module.rates) == {module.lamb_lr} == {large_batch.derived.learning_rates[0]}


def test_a_finder_whose_suggestion_a_scheduler_would_overwrite_is_refused(tmp_path: Path) -> None:
    module = Configured(lambda o: torch_schedulers.StepLR(o, 3))
    with pytest.raises(ConflictError, match=r"scheduler StepLR.*Tuner"):
        found = LearningRateFinder(1e-4, 0.1, 4, early_stop_threshold=None)
        fit(module, LargeBatch(16), found, max_epochs=20, default_root_dir=tmp_path)


# ---- schedulers that hold rates of their own


class Absolute:
    """As timm's schedulers work: no LRScheduler, base values of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.base = optimizer, [group["lr"] for group in optimizer.param_groups]

    def step_update(self, step: int) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base):
            group["lr"] = base * 0.9**step

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class StepsByItself(Configured):
    """What Lightning asks for beside a scheduler that is no LRScheduler."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)


class OwnPeak(torch_schedulers.LRScheduler):
    """Ignores base_lrs."""

    def get_lr(self) -> list[float]:
        return [0.02 * min(1.0, self.last_epoch / 2) for _ in self.optimizer.param_groups]


class OwnDecay(torch_schedulers.LRScheduler):
    """Follows base_lrs."""

    def get_lr(self) -> list[float]:
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


def timms() -> Any:
    """timm's schedulers from their folder alone: ``import timm`` also imports torchvision, which need not be there."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    alone = types.ModuleType("timm_scheduler_alone")
    alone.__path__ = [f"{next(iter(spec.submodule_search_locations))}/scheduler"]
    sys.modules["timm_scheduler_alone"] = alone
    return alone


def timms_own(module: str, name: str, **options: Any) -> Any:
    """Makes a scheduler of timm."""
    return lambda optimizer: getattr(importlib.import_module(f"{timms().__name__}.{module}"), name)(
        optimizer, t_in_epochs=False, **options
    )


FOREIGN = {
    "duck": Absolute,
    "timm cosine": timms_own("cosine_lr", "CosineLRScheduler", t_initial=8),
    "timm step": timms_own("step_lr", "StepLRScheduler", decay_t=3),
    "timm poly": timms_own("poly_lr", "PolyLRScheduler", t_initial=8),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    "subclass": OwnPeak,
    "inside": lambda o: torch_schedulers.SequentialLR(o, [torch_schedulers.ConstantLR(o), OwnPeak(o)], [2]),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_scheduler_with_rates_of_its_own_is_refused_where_rates_are_scaled(make: Any) -> None:
    """Announced 0.02, trained with 0.02 once and with 0.0099 from the second step on."""
    with pytest.raises(ConflictError, match=r"multiplies the learning rate by 2, and .* values of its own.*scaled_lr"):
        fit(StepsByItself(make, interval="step"), LargeBatch(16, base_batch_size=4))


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_without_scaling_a_scheduler_with_rates_of_its_own_trains_as_without_large_batch(make: Any) -> None:
    rates = []
    for callbacks, accumulate in (([LargeBatch(8)], 1), ([], 2)):
        module = StepsByItself(make, interval="step")
        if not hasattr(make(module.make_optimizer([("w", torch.nn.Parameter(torch.ones(1)))])), "step_update"):
            module = Configured(make, interval="step")
        fit(module, *callbacks, accumulate_grad_batches=accumulate)
        rates.append(module.rates)
    assert rates[0] == rates[1]
    assert len(rates[0]) == 4


def test_a_subclass_that_follows_its_base_rates_is_scaled() -> None:
    module = Configured(OwnDecay, interval="step")
    fit(module, LargeBatch(16, base_batch_size=4), max_epochs=2)
    assert module.rates == pytest.approx([0.04 * 0.5**step for step in range(4)])


@pytest.mark.parametrize("make", [torch_schedulers.ReduceLROnPlateau, lambda o: torch_schedulers.OneCycleLR(o, 0.1, 9)])
def test_trying_a_scheduler_out_touches_neither_it_nor_the_optimizer(make: Any) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    schedulers = [make(optimizer), OwnDecay(optimizer)]
    before = [dict(group) for group in optimizer.param_groups], [repr(s.state_dict()) for s in schedulers]
    refuse_unscalable(schedulers, optimizer, [2.0])
    assert before == ([dict(group) for group in optimizer.param_groups], [repr(s.state_dict()) for s in schedulers])


# ---- interval and frequency


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"interval": "epoch"},
        {"interval": "epoch", "frequency": 2},
        {"interval": "step"},
        {"interval": "step", "frequency": 4},
        {"interval": "step", "frequency": 8},
    ],
)
def test_interval_and_frequency_of_configure_optimizers_are_obeyed(config: dict[str, Any]) -> None:
    """LargeBatch stepped `LambdaLR(0.1 ** (epoch // 30))` after every optimizer step, whatever the module said."""
    halving = lambda optimizer: torch_schedulers.ExponentialLR(optimizer, 0.5)
    ours, stock = Configured(halving, **config), Configured(halving, **config)
    fit(ours, LargeBatch(8), max_epochs=3)
    fit(stock, max_epochs=3, accumulate_grad_batches=2)
    assert ours.rates == stock.rates
    assert len(ours.rates) == 12


@pytest.mark.parametrize("frequency", [1, 2])
def test_reduce_on_plateau_keeps_its_monitor_and_frequency_and_is_scaled(frequency: int) -> None:
    make = lambda optimizer: torch_schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for interval in (None, "step"):
        module = Watches(make, monitor="watched", frequency=frequency)
        fit(module, LargeBatch(16, base_batch_size=4, scheduler_interval=interval), max_epochs=4)
        kept = [0.04, 0.04, 0.02, 0.01] if frequency == 1 else [0.04, 0.04, 0.04, 0.04]
        assert module.rates == pytest.approx([rate for rate in kept for _ in range(2)])


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_an_explicit_interval_converts_every_scheduler(interval: Any) -> None:
    module = Configured(lambda o: torch_schedulers.ExponentialLR(o, 0.5), interval="epoch", frequency=1)
    fit(module, LargeBatch(16, scheduler_interval=interval), max_epochs=2)
    assert module.rates == pytest.approx([0.02, 0.01, 0.005, 0.0025] if interval == "step" else [0.02] * 2 + [0.01] * 2)


# ---- no optimizer


class NoOptimizer(Regression):
    """Trains nothing."""

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("options", [{"base_lr": 0.1, "base_batch_size": 4}, {"warmup_steps": 2}])
def test_no_optimizer_to_set_the_rate_of_is_refused(options: dict[str, Any]) -> None:
    """It was KeyError: 'lr'."""
    with pytest.raises(ConflictError, match=r"NoOptimizer.configure_optimizers returned no optimizer"):
        fit(NoOptimizer(), LargeBatch(16, **options))


def test_base_lr_for_an_optimizer_without_a_default_rate_is_refused() -> None:
    class NoDefault(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            del self.defaults["lr"]

    with pytest.raises(InvalidOptionError, match=r"base_lr=0.1 .* NoDefault, which has no default lr"):
        fit(Regression(optimizer=NoDefault), LargeBatch(16, base_batch_size=4, base_lr=0.1))
