"""Schedules: every scheduler of torch per step and per epoch, and those of others.

``make(optimizer, factor, steps)`` is called twice: by the module with ``factor`` 1, and for the expectation with the
factor of the batch, on an optimizer that was made with the scaled rate.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_lamb import StagedWarmup
from tests.lightning.composition.cell import RATE, SchedulerFeature

STEP = {"interval": "step"}
PLATEAU = {"monitor": "val"}


def one_cycle(o: Any, f: float, steps: int) -> LRScheduler:
    """``total_steps`` is what the Trainer says inside ``configure_optimizers``."""
    return torch_schedulers.OneCycleLR(o, max_lr=[0.1 * f] * len(o.param_groups), total_steps=steps)


TORCH: dict[str, Any] = {
    "LambdaLR": lambda o, f, n: LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o, f, n: torch_schedulers.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o, f, n: torch_schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o, f, n: torch_schedulers.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o, f, n: torch_schedulers.ConstantLR(o, 0.5, total_iters=2),
    "LinearLR": lambda o, f, n: torch_schedulers.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o, f, n: torch_schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o, f, n: torch_schedulers.SequentialLR(
        o, [torch_schedulers.LinearLR(o, 0.1, total_iters=2), torch_schedulers.CosineAnnealingLR(o, 10)], [2]
    ),
    "CosineAnnealingLR": lambda o, f, n: torch_schedulers.CosineAnnealingLR(o, 20),
    "ChainedScheduler": lambda o, f, n: torch_schedulers.ChainedScheduler(
        [torch_schedulers.LinearLR(o, 0.1, total_iters=3), torch_schedulers.ExponentialLR(o, 0.9)]
    ),
    "CyclicLR": lambda o, f, n: torch_schedulers.CyclicLR(o, 0.01 * f, 0.1 * f, step_size_up=2, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o, f, n: torch_schedulers.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": one_cycle,
    "PolynomialLR": lambda o, f, n: torch_schedulers.PolynomialLR(o, 20),
}
"""All of ``torch.optim.lr_scheduler.__all__`` but its base class and ReduceLROnPlateau."""


class Halving(LRScheduler):
    """A user's own subclass."""

    def get_lr(self) -> list[float]:
        return [base * 0.5 ** (self.last_epoch // 2) for base in self.base_lrs]


class OwnBase(LRScheduler):
    """A user's own subclass that remembers the rates under a name of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [peak * 0.5 ** (self.last_epoch // 2) for peak in self.peaks]


class DuckTyped:
    """Steps an optimizer, and is no LRScheduler: Lightning wants an ``lr_scheduler_step`` for it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def step(self, *_: Any) -> None:
        self.steps += 1
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * 0.9**self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def polynomial(warmup: int, length: int | None = None) -> Any:
    """StagedWarmup in plain torch: a ramp that reaches the peak in ``warmup`` steps, on a straight line to 0."""

    def make(o: Any, f: float, n: int) -> LRScheduler:
        total = length or n
        return LambdaLR(o, lambda t: (t + 1) / warmup if t < warmup else max(0.0, 1 - t / total))

    return make


def plateau(o: Any, f: float, n: int) -> Any:
    return torch_schedulers.ReduceLROnPlateau(o, factor=0.5, patience=0)


def timms(o: Any, f: float, n: int) -> Any:
    """timm's, from its folder of schedulers alone: ``import timm`` wants torchvision, which need not be there."""
    timm = importlib.util.find_spec("timm")
    assert timm is not None and timm.origin is not None
    alone = types.ModuleType("timm_schedulers_alone")
    alone.__path__ = [str(Path(timm.origin).parent / "scheduler")]
    sys.modules.setdefault(alone.__name__, alone)
    return importlib.import_module("timm_schedulers_alone.cosine_lr").CosineLRScheduler(o, t_initial=20, lr_min=1e-5)


UNSCALED = {"lr_scaling": "none"}
WANTED = {"scheduler_interval": "step"}
IN_PAIRS = ("ExponentialLR", "OneCycleLR", "CyclicLR", "ChainedScheduler", "SequentialLR")
BY_STEP = [
    SchedulerFeature(f"{name}, per step", make, config=STEP, alone=name not in IN_PAIRS) for name, make in TORCH.items()
]
BY_EPOCH = [
    SchedulerFeature(f"{name}, per epoch", make, config={"interval": "epoch"}, alone=name != "StepLR")
    for name, make in TORCH.items()
    if name != "OneCycleLR"
]
OTHERS = [
    SchedulerFeature("per epoch because nothing is said (Lightning's default)", TORCH["StepLR"]),
    SchedulerFeature("per step, `frequency=2`", TORCH["ExponentialLR"], config={"interval": "step", "frequency": 2}),
    SchedulerFeature("per epoch, `frequency=2`", TORCH["ExponentialLR"], config={"interval": "epoch", "frequency": 2}),
    SchedulerFeature(
        '`LargeBatch(scheduler_interval="step")`',
        TORCH["StepLR"],
        config={"interval": "step", "asked": "epoch"},
        large_batch=WANTED,
    ),
    SchedulerFeature("ReduceLROnPlateau, per epoch", plateau, config={"interval": "epoch", **PLATEAU}),
    SchedulerFeature("ReduceLROnPlateau, per step", plateau, config={"interval": "step", "monitor": "constant"}),
    SchedulerFeature("a user's own subclass", lambda o, f, n: Halving(o), config=STEP),
    SchedulerFeature(
        "a user's own subclass with base rates under its own name",
        lambda o, f, n: OwnBase(o),
        config=STEP,
        refused="OwnBase",
        remark='build the optimizer with `scaling.scaled_lr` and `lr_scaling="none"`',
    ),
    SchedulerFeature('the same, `lr_scaling="none"`', lambda o, f, n: OwnBase(o), config=STEP, large_batch=UNSCALED),
    SchedulerFeature("duck-typed scheduler", lambda o, f, n: DuckTyped(o), config=STEP, refused="DuckTyped"),
    SchedulerFeature(
        'duck-typed scheduler, `lr_scaling="none"`', lambda o, f, n: DuckTyped(o), config=STEP, large_batch=UNSCALED
    ),
    SchedulerFeature(
        "timm's CosineLRScheduler", timms, config={"interval": "epoch"}, refused="CosineLRScheduler", needs="timm"
    ),
    SchedulerFeature(
        'timm\'s CosineLRScheduler, `lr_scaling="none"`',
        timms,
        config={"interval": "epoch"},
        large_batch=UNSCALED,
        needs="timm",
    ),
    SchedulerFeature(
        "StagedWarmup, length from the Trainer",
        lambda o, f, n: StagedWarmup(o, warmup_steps=3),
        config=STEP,
        rule=polynomial(3),
        cli=("--lr_scheduler=lightning_lamb.StagedWarmup", "--lr_scheduler.warmup_steps=3"),
    ),
    SchedulerFeature(
        'StagedWarmup left at Lightning\'s "epoch"',
        lambda o, f, n: StagedWarmup(o, total_steps=15, warmup_steps=3),
        config={"interval": "step", "asked": "epoch"},
        rule=polynomial(3, 15),
        remark="counts optimizer steps whatever the interval says",
    ),
]

SCHEDULERS = [*BY_STEP, *BY_EPOCH, *OTHERS]
assert math.isclose(RATE, 0.01), "CyclicLR's rates are those of the optimizer"
