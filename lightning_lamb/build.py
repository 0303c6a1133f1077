"""Builds the optimizer and the schedule: for `LambMixin`, for `LambCLI`, and for DeepSpeed's JSON."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.optimizers import LayerwiseOptimizer, ShardedStateOptimizer
from lightning_lamb.param_groups import GroupRules, RuledGroup, settle
from lightning_lamb.schedules import StagedWarmup


def build_optimizer(
    params: Any,
    target: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    rules: GroupRules | None = None,
    shard_state: bool = False,
    owner: str = "the model",
) -> Optimizer:
    """The optimizer that ``target`` makes of ``params`` with ``options``, as ``target(params, **options)`` would be.

    Groups of `lamb_param_groups` follow the optimizer's own options and defaults, a preset's too, where the rules leave
    something open. Optimizers that are not ours get groups that differ by weight decay only, without names. A learning
    rate that is a tensor is copied, once for each group.

    Args:
        params: (name, parameter) pairs, parameters, or groups of them.
        target: an optimizer class, or a function that makes one: Lamb, Lars, a preset, any other.
        options: what the user said, by the names in the signature of ``target``.
        rules: that the groups were made by; compared with ``options``.
        shard_state: divide the state of a Lamb or Lars over ranks.
        owner: whose parameters they are, for messages.

    Raises:
        InvalidOptionError: nothing to train, ``options`` that contradict ``rules``, or a value that cannot be meant.
    """
    options = dict(options)
    members = list(params)
    _refuse_nothing(members, owner)
    if rules is not None:
        rules.refuse_contradiction(options.get("exempt_1d"))
    rate = options.get("lr")
    if isinstance(rate, Tensor) and not rate.requires_grad:
        options["lr"] = rate.clone()
    if any(isinstance(group, RuledGroup) for group in members):
        defaults = _defaults_of(target, options)
        if "exempt_1d" in defaults:
            members = settle(members, defaults["exempt_1d"])
        else:
            _refuse_adapting_rules(rules, target)
            members = _by_decay(members, defaults)
    built = ShardedStateOptimizer(members, target, **options) if shard_state else target(members, **options)
    return _with_own_rates(built, options.get("lr"))


def _defaults_of(target: Callable[..., Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What every group gets that says nothing itself: ``options``, and what ``target`` has by default."""
    if isinstance(target, type) and not issubclass(target, LayerwiseOptimizer):
        signature = inspect.signature(target).parameters.values()
        return {**{one.name: one.default for one in signature if one.default is not one.empty}, **options}
    # Nothing lies on the meta device, so that it says nothing about kernels either.
    template = target([nn.Parameter(torch.empty(0, device="meta"))], **options)
    defaults: Mapping[str, Any] = template.defaults
    return defaults


def build_schedule(
    optimizer: Optimizer,
    options: Mapping[str, Any],
    total_steps: Callable[[], int] | None = None,
    *,
    follow: bool = True,
) -> StagedWarmup:
    """A StagedWarmup that counts the optimizer's steps, its length filled in where it was left out.

    Args:
        optimizer: whose learning rates it sets.
        options: of StagedWarmup.
        total_steps: tells the length of the training, if it is asked; None leaves it open.
        follow: count only steps that the optimizer made; False where whoever steps the schedule sees to that.

    Raises:
        InvalidOptionError: an option out of range.
        PlanError: the warm-up does not fit into the length.
    """
    scheduler = StagedWarmup(optimizer, **options)
    if follow:
        scheduler.follow_optimizer()
    if scheduler.total_steps is None and total_steps is not None:
        scheduler.set_total_steps(total_steps())
    return scheduler


def builds_ours(target: Any) -> bool:
    """Whether a class, or a function by its return annotation, gives a Lamb or Lars."""
    while isinstance(target, types.MethodType) or hasattr(target, "func"):
        target = target.__func__ if isinstance(target, types.MethodType) else target.func
    kind = target if isinstance(target, type) else get_type_hints(target).get("return")
    return isinstance(kind, type) and issubclass(kind, LayerwiseOptimizer)


def said_options(target: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not what ``target`` has by default: a parsed configuration lists all of them."""
    known = inspect.signature(target).parameters
    return {name: value for name, value in options.items() if name not in known or known[name].default != value}


def _refuse_nothing(members: list[Any], owner: str) -> None:
    """Raises where torch would say that it got an empty parameter list. Generators in groups become lists."""
    for group in members:
        if isinstance(group, dict) and isinstance(group.get("params"), Iterator):
            group["params"] = list(group["params"])
    groups = [group.get("params", ()) if isinstance(group, dict) else group for group in members]
    if all(isinstance(params, (list, tuple, set)) and not params for params in groups):
        raise InvalidOptionError(
            f"{owner} has no parameter to train: all are frozen (requires_grad=False), or none exists yet. Unfreeze "
            "some before the optimizer is made (in __init__, setup or configure_model; a fine-tuning callback must "
            "leave some layers trainable), or return None from configure_optimizers to run without an optimizer."
        )


def _refuse_adapting_rules(rules: GroupRules | None, target: Any) -> None:
    """Raises for rules about trust ratios beside an optimizer that has none."""
    names = ("no_adapt_names", "no_adapt_types", "no_adapt_1d")
    said = [name for name in names if rules is not None and getattr(rules, name) not in ([], None)]
    if said:
        raise InvalidOptionError(
            f"{', '.join(said)} of the group rules beside {getattr(target, '__name__', target)}, which has no trust "
            "ratio: leave it out, or use Lamb or Lars."
        )


def _by_decay(groups: list[Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups for optimizers without layer-wise normalisation, which may know neither ``adapt`` nor names."""
    by_options: dict[Any, dict[str, Any]] = {}
    for group in (
        part for given in groups for part in (given.completed(defaults) if isinstance(given, RuledGroup) else [given])
    ):
        options = {key: value for key, value in group.items() if key not in ("params", "adapt", "exempt_1d")}
        params = [member[1] if isinstance(member, tuple) else member for member in group["params"]]
        by_options.setdefault(repr(options), {**options, "params": []})["params"].extend(params)
    return list(by_options.values())


def _with_own_rates(optimizer: Any, rate: Any) -> Optimizer:
    """Gives every group that took the common learning rate a tensor of its own, if it is one."""
    if isinstance(rate, Tensor) and not rate.requires_grad:
        for group in optimizer.param_groups:
            if group["lr"] is rate:
                group["lr"] = rate.clone()
    return cast("Optimizer", optimizer)
