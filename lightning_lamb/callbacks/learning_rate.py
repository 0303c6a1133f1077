"""Scales the learning rate after optimizer and schedulers exist, as if they had been made with the scaled one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

LEARNING_RATE_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Learning rates in parameter groups: torch's own and those of OneCycleLR."""

LEARNING_RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Learning rates that schedulers copied from the groups when they were made."""


def multiply_learning_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiplies all learning rates by ``factor``, those that schedulers remember included.

    Exact for every scheduler of torch that is proportional to its base rate, alone or inside SequentialLR and
    ChainedScheduler. Call it before a checkpoint is restored: the restored values are scaled already.

    Args:
        optimizers: their groups are modified in place.
        schedulers: their remembered rates are modified in place.
        factor: e.g. sqrt(batch / base batch).
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in LEARNING_RATE_KEYS:
                if key in group:
                    group[key] = group[key] * factor  # a tensor too gets a new one: groups may share theirs
    for scheduler in schedulers:
        _multiply_remembered(scheduler, factor)


def _multiply_remembered(scheduler: Any, factor: float) -> None:
    """Multiplies what one scheduler, and the schedulers inside it, remember."""
    for name in LEARNING_RATE_LISTS:
        if hasattr(scheduler, name):
            setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    for inner in getattr(scheduler, "_schedulers", []):
        _multiply_remembered(inner, factor)
