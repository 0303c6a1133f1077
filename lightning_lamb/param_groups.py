"""Which parameters decay and which have a trust ratio: (name, parameter) to parameter group."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lamb.checks import regular_expression
from lightning_lamb.errors import InvalidOptionError

NamedParameters = Iterable[tuple[str, Tensor]]


@dataclass
class GroupRules:
    """Who is exempt from weight decay, and who from the trust ratio; two separate choices.

    Args:
        no_decay_names: regular expressions; a parameter whose name contains a match has no weight decay.
        no_adapt_names: regular expressions; a parameter whose name contains a match has no trust ratio.
        no_decay_types: module class names (as "LayerNorm" or "torch.nn.LayerNorm"); their parameters have no decay.
        no_adapt_types: module class names; their parameters have no trust ratio.
        no_decay_1d: parameters with at most one dimension (biases, norm scales) have no weight decay.
        no_adapt_1d: parameters with at most one dimension have no trust ratio.

    Raises:
        InvalidOptionError: a name that is no regular expression.
    """

    no_decay_names: list[str] = field(default_factory=list)
    no_adapt_names: list[str] = field(default_factory=list)
    no_decay_types: list[str] = field(default_factory=list)
    no_adapt_types: list[str] = field(default_factory=list)
    no_decay_1d: bool = True
    no_adapt_1d: bool = True

    def __post_init__(self) -> None:
        for option in ("no_decay_names", "no_adapt_names"):
            for pattern in getattr(self, option):
                regular_expression(option, pattern)


def lamb_param_groups(
    model: nn.Module | NamedParameters,
    *,
    weight_decay: float = 0.01,
    rules: GroupRules | None = None,
    shape_of: Callable[[Tensor], Sequence[int]] = lambda parameter: parameter.shape,
    clean: Callable[[str], str] = lambda name: name,
) -> list[dict[str, Any]]:
    """Parameter groups for `Lamb` and `Lars`, at most one for each combination of decay and adaptation.

    Args:
        model: a module, or (name, parameter) pairs where no rule names a module type. Frozen parameters are left out,
            tied ones appear once.
        weight_decay: of the parameters that no rule exempts.
        rules: who is exempt; by default what has at most one dimension.
        shape_of: the true shape of a parameter; `sharding.true_shape` where parameters are slices.
        clean: makes a parameter's true name of the one in ``model``; `sharding.clean_name` for wrapped models.

    Returns:
        Groups with ``params`` (a list of (name, parameter)), ``weight_decay``, ``adapt`` and ``exempt_1d=False``: the
        shape rule has been applied.

    Raises:
        InvalidOptionError: a pattern or type that matches nothing; types without a module; rules that are no
            GroupRules; parameters without their names.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> for group in lamb_param_groups(model):
    ...     print([name for name, _ in group["params"]], group["weight_decay"], group["adapt"])
    ['0.weight'] 0.01 True
    ['0.bias', '1.weight', '1.bias'] 0.0 False
    """
    rules = GroupRules() if rules is None else rules
    if not isinstance(rules, GroupRules):
        raise InvalidOptionError(f"rules={rules!r} must be GroupRules(...), not a {type(rules).__name__}.")
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    if any(isinstance(pair, Tensor) for pair in named):
        raise InvalidOptionError("parameters come without names: pass the module, or its named_parameters().")
    named = [(clean(name), parameter) for name, parameter in named if parameter.requires_grad]
    no_decay = _matching(model, named, rules.no_decay_names, rules.no_decay_types, "no_decay")
    no_adapt = _matching(model, named, rules.no_adapt_names, rules.no_adapt_types, "no_adapt")
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in named:
        is_1d = len(shape_of(parameter)) <= 1
        decays = not (id(parameter) in no_decay or (is_1d and rules.no_decay_1d))
        adapts = not (id(parameter) in no_adapt or (is_1d and rules.no_adapt_1d))
        options = {"weight_decay": weight_decay if decays else 0.0, "adapt": adapts, "exempt_1d": False}
        groups.setdefault((decays, adapts), {"params": [], **options})["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups, reverse=True)]


def _matching(
    model: nn.Module | NamedParameters,
    named: Sequence[tuple[str, Tensor]],
    patterns: Sequence[str],
    types: Sequence[Any],
    option: str,
) -> set[int]:
    """Ids of the parameters that a name pattern or a module type matches."""
    found: set[int] = set()
    for pattern in patterns:
        matches = {id(parameter) for name, parameter in named if re.search(pattern, name)}
        if not matches:
            raise InvalidOptionError(
                f"{option}_names: {pattern!r} matches none of the {len(named)} parameter names, such as "
                f"{', '.join(name for name, _ in named[:5])}. Correct or remove it."
            )
        found |= matches
    for kind in types:
        if not isinstance(model, nn.Module):
            raise InvalidOptionError(
                f"{option}_types={list(types)!r} needs the module: pass it instead of named parameters."
            )
        modules = [module for module in model.modules() if _is_type(module, kind)]
        if not modules:
            present = sorted({type(module).__name__ for module in model.modules()})
            raise InvalidOptionError(
                f"{option}_types: the model has no {kind!r}, only {', '.join(present)}. Correct it."
            )
        found |= {id(parameter) for module in modules for parameter in module.parameters()}
    return found


def _is_type(module: nn.Module, kind: str | type) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    return any(
        kind in (parent.__name__, f"{parent.__module__}.{parent.__qualname__}") or _public_path(parent) == kind
        for parent in type(module).__mro__
    )


def _public_path(kind: type) -> str:
    """Torch defines ``torch.nn.LayerNorm`` in a submodule; people write the short path."""
    return f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else ""
