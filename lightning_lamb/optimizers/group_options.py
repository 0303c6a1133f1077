"""What a parameter group becomes before an optimizer takes it: names, and the options that group rules left to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_lamb.param_groups import Exemptions, RuledGroup
from lightning_lamb.sharding.annotate import clean_name, true_name, true_shape


class TakesGroups(Protocol):
    """What is read of an optimizer here."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    exemptions: Exemptions | None
    """The rules behind the groups that it was built with; None if there were none."""


def parts_of(optimizer: TakesGroups, group: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups to add in the place of ``group``.

    Groups of `lamb_param_groups` are completed with the optimizer's options. A group that comes later, as from
    Lightning's BaseFinetuning, gets names where the others have some (torch refuses it otherwise), and is treated by
    the rules that the first ones were made by; what it says itself wins.

    Args:
        optimizer: that takes them; notes the rules.
        group: as the user gave it.
    """
    if isinstance(group, RuledGroup):
        optimizer.exemptions = group.exemptions
        return group.completed(optimizer.defaults)
    if not optimizer.param_groups or "params" not in group or isinstance(group["params"], set):
        return [group]
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    named = _named(params, group.get("param_names"), len(optimizer.param_groups))
    has_names = "param_names" in optimizer.param_groups[0]
    own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    parts = (
        [({}, named)] if optimizer.exemptions is None else _by_rules(named, optimizer.exemptions, optimizer.defaults)
    )
    return [
        {**options, **own, "params": members if has_names else [parameter for _, parameter in members]}
        for options, members in parts
    ]


def _named(params: Sequence[Any], names: Sequence[str] | None, index: int) -> list[tuple[str, Any]]:
    named = []
    for position, member in enumerate(params):
        if isinstance(member, tuple):
            named.append((member[0], member[1]))
        elif names is not None and len(names) == len(params):
            named.append((names[position], member))
        else:
            known = true_name(member) if isinstance(member, Tensor) else None
            named.append((known or f"group{index}.param{position}", member))
    return named


def _by_rules(
    named: Sequence[tuple[str, Any]], exemptions: Exemptions, defaults: Mapping[str, Any]
) -> list[tuple[dict[str, Any], list[tuple[str, Any]]]]:
    """Options and members of the groups; as few as can be, because callbacks count on what they added."""
    exempt_1d = bool(defaults.get("exempt_1d", True))
    decays_1d, adapts_1d = exemptions.treatment("", is_1d=True, exempt_1d=exempt_1d)
    one_rule = decays_1d == adapts_1d  # then the optimizer's own shape rule does it
    found: dict[tuple[bool, bool], list[tuple[str, Any]]] = {}
    for name, parameter in named:
        is_1d = not one_rule and len(true_shape(parameter)) <= 1
        found.setdefault(exemptions.treatment(clean_name(name), is_1d, exempt_1d), []).append((name, parameter))
    parts = []
    for (decays, adapts), members in sorted(found.items(), key=lambda item: item[0], reverse=True):
        options: dict[str, Any] = {"exempt_1d": one_rule and not decays_1d}
        if not decays:
            options["weight_decay"] = 0.0
        elif exemptions.weight_decay is not None:
            options["weight_decay"] = exemptions.weight_decay
        if not adapts:
            options["adapt"] = False
        elif exemptions.adapt is not None:
            options["adapt"] = exemptions.adapt
        parts.append((options, members))
    return parts
