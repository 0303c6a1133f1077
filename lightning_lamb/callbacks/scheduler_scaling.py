"""Which schedulers can be scaled after they were made, and the refusal of the others: they would train another rate."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_lamb.callbacks.learning_rate import inside, multiply_learning_rates
from lightning_lamb.errors import ConflictError
from lightning_lamb.schedules import StagedWarmup

PROBE_STEPS = 64
"""How far two copies of a scheduler are compared: long enough for a warm-up to show where it leads."""

RATE_METHODS = ("get_lr", "_get_closed_form_lr", "step", "_reduce_lr", "_update_lr")
"""Methods that decide about a learning rate; where torch's own are in force, torch's formulas are."""


def refuse_unscalable(schedulers: Sequence[Any], optimizer: Optimizer, factors: Sequence[float]) -> None:
    """Refuses schedulers that keep rates which cannot be multiplied from outside, if they have to be.

    torch's own and StagedWarmup follow their base rates. Another subclass of LRScheduler is tried out on a copy; what
    is no LRScheduler (timm's) cannot be looked into.

    Args:
        schedulers: what the Trainer steps.
        optimizer: whose rates would be multiplied.
        factors: by which, one per group; 1 asks nothing.

    Raises:
        ConflictError: naming the scheduler and the ways out.
    """
    if all(factor == 1.0 for factor in factors):
        return
    for scheduler in schedulers:
        if all(_is_known(one) for one in inside(scheduler)) or _follows_its_base(scheduler, optimizer):
            continue
        kind, shown = type(scheduler), " / ".join(f"{factor:.6g}" for factor in dict.fromkeys(factors))
        raise ConflictError(
            f"LargeBatch multiplies the learning rate by {shown}, and {kind.__module__}.{kind.__qualname__} computes "
            "rates from values of its own, which cannot be scaled from outside. Build optimizer and scheduler with the "
            "scaled rate (lightning_lamb.scaling.scaled_lr(lr, base_batch_size, global_batch_size)) and give "
            'LargeBatch lr_scaling="none" without base_lr, or use StagedWarmup or one of torch\'s schedulers.'
        )


def _is_known(scheduler: Any) -> bool:
    """Whether the formulas in force are torch's own or this package's."""
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        return False
    if isinstance(scheduler, StagedWarmup) and type(scheduler).get_lr is StagedWarmup.get_lr:
        return True
    methods = [getattr(type(scheduler), name, None) for name in RATE_METHODS]
    return all(method is None or method.__module__ == "torch.optim.lr_scheduler" for method in methods)


def _follows_its_base(scheduler: Any, optimizer: Optimizer) -> bool:
    """Whether a copy with multiplied base rates gives multiplied rates, step by step."""
    if not isinstance(scheduler, LRScheduler):
        return False
    factor, end = 2.0, getattr(scheduler, "total_steps", None)  # 2 is exact in floating point
    left = max(end - scheduler.last_epoch, 1) if isinstance(end, int) else PROBE_STEPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's about the order of steps: the optimizer of a copy makes none
        try:
            plain, scaled = _copy(scheduler, optimizer), _copy(scheduler, optimizer)
            multiply_learning_rates(scaled.optimizer, [scaled], [factor] * len(optimizer.param_groups))
            for _ in range(min(left, PROBE_STEPS)):
                for one, other in zip(plain.optimizer.param_groups, scaled.optimizer.param_groups):
                    if not math.isclose(float(one["lr"]) * factor, float(other["lr"]), rel_tol=1e-6, abs_tol=1e-30):
                        return False
                plain.step()
                scaled.step()
        except Exception:  # noqa: BLE001 - whatever a stranger's scheduler does on a copy: not known to follow, then
            return False
    return True


def _copy(scheduler: Any, optimizer: Optimizer) -> Any:
    """A copy that writes into a small optimizer with the same rates; the true one is not touched."""
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    small = SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in groups], lr=0.0)
    for own, values in zip(small.param_groups, groups):
        own.update(values)
    memo = {id(optimizer): small}
    made = copy.deepcopy(scheduler, memo)
    made.optimizer = small
    return made
