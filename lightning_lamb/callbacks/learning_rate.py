"""Scales learning rates after optimizer and schedulers exist, as if they had been made with the scaled ones, once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

LEARNING_RATE_KEYS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Learning rates in parameter groups: torch's own and those of OneCycleLR."""

LEARNING_RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
"""Learning rates that schedulers copied from the groups when they were made, one per group."""


class _Left(NamedTuple):
    """What a ``fit`` left in an optimizer.

    Attributes:
        factor: by which its own rates were multiplied.
        peaks: of every group, what the schedule was a multiple of.
        rates: of every group.
        by_own_schedule: LargeBatch had added the schedule that wrote the rates.
    """

    factor: float = 1.0
    peaks: Sequence[float] = ()
    rates: Sequence[float] = ()
    by_own_schedule: bool = False


# Not in the groups, which are the user's.
_LEFT: WeakKeyDictionary[Optimizer, _Left] = WeakKeyDictionary()


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
    left = _LEFT.get(optimizer, _Left())
    return [
        factor / left.factor if _is(peak, left.peaks, index) or _is(rate, left.rates, index) else factor
        for index, (peak, rate) in enumerate(zip(peak_rates(optimizer, schedulers), _rates(optimizer)))
    ]


def take_back_schedule(optimizer: Optimizer) -> None:
    """Gives groups their peak rates again where a schedule that LargeBatch had added to an earlier ``fit`` ended.

    Args:
        optimizer: which no schedule is made for yet. A rate that somebody gave it since is left.
    """
    left = _LEFT.get(optimizer, _Left())
    for index, (group, rate) in enumerate(zip(optimizer.param_groups, _rates(optimizer))):
        if left.by_own_schedule and "initial_lr" in group and _is(rate, left.rates, index):
            peak = group["initial_lr"]
            group["lr"] = peak.clone() if isinstance(peak, Tensor) else peak


def note_rates(optimizer: Optimizer, schedulers: Sequence[Any], factor: float, *, by_own_schedule: bool) -> None:
    """Remembers what was multiplied, by how much, and the rates that came of it; at the end of a ``fit`` once more."""
    _LEFT[optimizer] = _Left(factor, peak_rates(optimizer, schedulers), _rates(optimizer), by_own_schedule)


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _is(rate: float, rates: Sequence[float], index: int) -> bool:
    return index < len(rates) and math.isclose(rate, rates[index], rel_tol=1e-6)


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
