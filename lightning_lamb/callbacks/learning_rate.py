"""Scales learning rates after optimizer and schedulers exist, as if they had been made with the scaled ones, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

LEARNING_RATE_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Learning rates in parameter groups: torch's own and those of OneCycleLR."""

LEARNING_RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Learning rates that schedulers copied from the groups when they were made, one per group."""

# Per optimizer: the factor, and every group's peak rate as it was last seen. Not in the groups, which are the user's.
_SCALED: WeakKeyDictionary[Optimizer, tuple[float, list[float]]] = WeakKeyDictionary()


def inside(scheduler: Any) -> Iterator[Any]:
    """A scheduler, and those inside it (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from inside(inner)


def peak_rates(optimizer: Optimizer, schedulers: Sequence[Any]) -> list[float]:
    """The learning rate of every group that its schedule is a multiple of; without a schedule the rate itself."""
    every = [one for scheduler in schedulers for one in inside(scheduler)]
    # ReduceLROnPlateau has no base rate: it multiplies whatever the group has.
    keys = ["initial_lr", "lr"] if any(not isinstance(one, ReduceLROnPlateau) for one in every) else ["lr"]
    if any(isinstance(one, OneCycleLR) for one in every):
        keys.insert(0, "max_lr")
    return [float(group[next(key for key in keys if key in group)]) for group in optimizer.param_groups]


def outstanding_factors(optimizer: Optimizer, schedulers: Sequence[Any], factor: float) -> list[float]:
    """What every group is still to be multiplied by, so that its own rate is multiplied by ``factor`` in all.

    A group whose rate is still what an earlier ``fit`` left was multiplied then; one that somebody gave another rate
    since is taken as its own.

    Args:
        optimizer: made for this ``fit``, or kept from an earlier one.
        schedulers: what the Trainer steps.
        factor: of the optimizer's own rates.
    """
    before, left = _SCALED.get(optimizer, (1.0, []))
    return [
        factor / before if index < len(left) and math.isclose(peak, left[index], rel_tol=1e-6) else factor
        for index, peak in enumerate(peak_rates(optimizer, schedulers))
    ]


def note_rates(optimizer: Optimizer, schedulers: Sequence[Any], factor: float) -> None:
    """Remembers what was multiplied, by how much, and the rates that came of it; at the end of a ``fit`` once more."""
    _SCALED[optimizer] = factor, peak_rates(optimizer, schedulers)


def multiply_learning_rates(optimizer: Optimizer, schedulers: Iterable[Any], factors: Sequence[float]) -> None:
    """Multiplies all learning rates, those that schedulers remember included.

    Exact for every scheduler of torch, alone or inside SequentialLR and ChainedScheduler: it goes on as if made with
    the multiplied rates. Others are refused before (`lightning_lamb.callbacks.scheduler_scaling`).

    Args:
        optimizer: its groups are modified in place; tensors are replaced, because groups and users may share them.
        schedulers: their remembered rates are modified in place.
        factors: one per group.
    """
    if all(factor == 1.0 for factor in factors):
        return
    for group, factor in zip(optimizer.param_groups, factors):
        for key in LEARNING_RATE_KEYS:
            if key in group:
                group[key] = group[key] * factor
    for scheduler in schedulers:
        for one in inside(scheduler):
            for name in LEARNING_RATE_LISTS:
                if isinstance(getattr(one, name, None), list):
                    setattr(one, name, [rate * factor for rate, factor in zip(getattr(one, name), factors)])
