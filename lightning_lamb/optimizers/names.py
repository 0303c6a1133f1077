"""Brings a state dict into the order of the optimizer that loads it, by the names of parameters.

Torch loads by position. Two layers of one shape that changed places would continue with each other's moments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from lightning_lamb.errors import StateDictError
from lightning_lamb.sharding import clean_name, true_name

Names = list[list[str | None]]
"""Per parameter group; None where nobody knows a parameter's name."""

_GENERATED = re.compile(r"group\d+\.param\d+")


def ordered_by_name(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], owner: str) -> dict[str, Any]:
    """The state dict with its groups and parameters in the order of ``groups``, and with the names of ``groups``.

    Where both sides know all names, state goes to the parameter of its name, also into another group, and options to
    the group of the same parameters. A prefix that all names of one side have is no difference. Where names are not
    known, the order is left as it is, as in torch.

    Args:
        state_dict: of an optimizer; not modified. Its tensors are shared.
        groups: the parameter groups of the optimizer that loads it.
        owner: the optimizer's class name.

    Raises:
        StateDictError: other names, or groups of other parameters with options of their own; nothing was loaded.
    """
    saved_groups = state_dict["param_groups"]
    live = _known([group.get("param_names") for group in groups], groups)
    annotated = [[_usable(true_name(parameter)) for parameter in group["params"]] for group in groups]
    saved = _known([group.get("param_names") for group in saved_groups], saved_groups)
    keys = _keys(saved_groups)
    live = live if _all_known(live) or not _all_known(annotated) else annotated
    if keys is not None:  # names in the place of numbers: by whoever put them there, they are the truth
        matching = [own for own in (live, annotated) if _same_names(keys, own)]
        if matching:
            saved, live = keys, matching[0]
        elif not _all_known(saved):
            saved = [[None] * len(names) for names in keys]
    if not _agree(saved, live):
        saved_groups = _reordered(saved_groups, saved, live, owner)
    return {**state_dict, "param_groups": [_with_names_of(*pair) for pair in _pairs(saved_groups, groups)]}


def _known(found: Sequence[Sequence[str] | None], groups: Sequence[Mapping[str, Any]]) -> Names:
    """The names in the groups; under ZeRO a group has more names than tensors, and then they are none."""
    return [
        [_usable(name) for name in names]
        if names and len(names) == len(group["params"])
        else [None] * len(group["params"])
        for names, group in zip(found, groups)
    ]


def _usable(name: str | None) -> str | None:
    """Without what wrappers add; a made-up name says no more than the position."""
    return None if name is None or _GENERATED.fullmatch(name) else clean_name(name)


def _keys(saved_groups: Sequence[Mapping[str, Any]]) -> Names | None:
    keys = [list(group["params"]) for group in saved_groups]
    if not all(isinstance(key, str) for key in chain.from_iterable(keys)) or not any(keys):
        return None
    return [[clean_name(key) for key in group] for group in keys]


def _all_known(names: Names) -> bool:
    return all(name is not None for name in chain.from_iterable(names))


def _same_names(one: Names, other: Names) -> bool:
    return _all_known(other) and _renaming(_flat(one), _flat(other)) is not None


def _flat(names: Names) -> list[str]:
    return [name for name in chain.from_iterable(names) if name is not None]


def _agree(saved: Names, live: Names) -> bool:
    """Whether no position has two different names."""
    if list(map(len, saved)) != list(map(len, live)):
        return not (_all_known(saved) and _all_known(live))
    pairs = zip(chain.from_iterable(saved), chain.from_iterable(live))
    return all(one is None or other is None or one == other for one, other in pairs)


def _renaming(saved: Sequence[str], live: Sequence[str]) -> dict[str, str] | None:
    """Saved names by live ones; they may differ by a prefix that all have. None where they do not match."""
    if len(set(saved)) != len(saved) or len(set(live)) != len(live) or len(saved) != len(live):
        return None
    if set(saved) == set(live):
        return {name: name for name in live}
    first, wanted = saved[0], set(live)
    for name in live:
        if first.endswith(f".{name}") and set(saved) == {first[: -len(name)] + one for one in wanted}:
            return {one: first[: -len(name)] + one for one in live}
        if name.endswith(f".{first}") and wanted == {name[: -len(first)] + one for one in saved}:
            return {name[: -len(first)] + one: one for one in saved}
    return None


def _reordered(
    saved_groups: Sequence[Mapping[str, Any]], saved: Names, live: Names, owner: str
) -> Sequence[Mapping[str, Any]]:
    known, wanted = _flat(saved), _flat(live)
    if sorted(map(len, saved)) != sorted(map(len, live)):
        return saved_groups  # `state.check_state_dict` compares the numbers
    renaming = _renaming(known, wanted) if _all_known(saved) and _all_known(live) else None
    if renaming is None:
        missing = [name for name in wanted if name not in known] or ["none"]
        strange = [name for name in known if name not in wanted] or ["none"]
        raise StateDictError(
            f"The state dict is of other parameters than this {owner}'s: only in the state dict: "
            f"{', '.join(strange[:5])}; only here: {', '.join(missing[:5])}. Load the state of this model. If "
            "parameters were only renamed, in the same order, remove 'param_names' from the state dict's param_groups "
            "to load by position. Nothing was loaded."
        )
    home = {
        name: (index, key)
        for index, (group, names) in enumerate(zip(saved_groups, saved))
        for name, key in zip(names, group["params"])
    }
    result = []
    for index, names in enumerate(live):
        places = [home[renaming[name]] for name in names if name is not None]
        sources = sorted({place[0] for place in places}) or [min(index, len(saved_groups) - 1)]
        options = [_options(saved_groups[source]) for source in sources]
        whole = len(sources) == 1 and len(saved[sources[0]]) == len(names)
        if not whole and any(other != options[0] for other in [*options, *map(_options, saved_groups)]):
            raise StateDictError(
                f"{names[0]}: its parameter group {index} has other members in the state dict ({owner} there was built "
                "with other group rules), and groups have options of their own. Build it with the same group rules. "
                "Nothing was loaded."
            )
        result.append({**saved_groups[sources[0]], "params": [key for _, key in places]})
    return result


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What two groups can be compared by."""
    return {
        key: float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _pairs(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any] | None]]:
    if len(saved_groups) != len(groups):
        return [(saved, None) for saved in saved_groups]
    return list(zip(saved_groups, groups))


def _with_names_of(saved: Mapping[str, Any], group: Mapping[str, Any] | None) -> dict[str, Any]:
    """The names of the optimizer that loads stay: torch would replace them by the saved ones."""
    found = {key: value for key, value in saved.items() if key != "param_names" or group is None}
    if group is not None and "param_names" in group:
        found["param_names"] = list(group["param_names"])
    return found
