"""Which parameters decay and which have a trust ratio: (name, parameter) to parameter group.

What decides, the first that says something:

1. a key that the user wrote into a parameter group, or changed there, as everywhere in torch;
2. `GroupRules`: names, module types, and ``no_decay_1d`` / ``no_adapt_1d`` where they are set;
3. the optimizer's own options (``weight_decay``, ``adapt``, ``exempt_1d``), which for a preset are the preset's.

An ``exempt_1d`` that the user gave beside a ``no_decay_1d`` or ``no_adapt_1d`` that says otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_lamb.checks import regular_expression
from lightning_lamb.errors import InvalidOptionError

NamedParameters = Iterable[tuple[str, Tensor]]

DEFAULT_DECAY = 0.01
"""What a group shows where nobody gave a decay; `Lamb` and `Lars` put their own in its place."""


@dataclass
class GroupRules:
    """Who is exempt from weight decay, and who from the trust ratio; two separate choices.

    Args:
        no_decay_names: regular expressions; a parameter whose name contains a match has no weight decay.
        no_adapt_names: regular expressions; a parameter whose name contains a match has no trust ratio.
        no_decay_types: module class names (as "LayerNorm" or "torch.nn.LayerNorm"); their parameters have no decay.
        no_adapt_types: module class names; their parameters have no trust ratio.
        no_decay_1d: whether parameters with at most one dimension (biases, norm scales) have no weight decay. None: as
            the optimizer's exempt_1d says; True without one.
        no_adapt_1d: whether parameters with at most one dimension have no trust ratio. None: as for no_decay_1d.

    Raises:
        InvalidOptionError: a name that is no regular expression.
    """

    no_decay_names: list[str] = field(default_factory=list)
    no_adapt_names: list[str] = field(default_factory=list)
    no_decay_types: list[str] = field(default_factory=list)
    no_adapt_types: list[str] = field(default_factory=list)
    no_decay_1d: bool | None = None
    no_adapt_1d: bool | None = None

    def __post_init__(self) -> None:
        for option in ("no_decay_names", "no_adapt_names"):
            for pattern in getattr(self, option):
                regular_expression(option, pattern)

    def refuse_contradiction(self, exempt_1d: bool | None) -> None:
        """Raises where an ``exempt_1d`` that the user gave says something else than a rule that was given.

        Args:
            exempt_1d: what the user gave; None for nothing.

        Raises:
            InvalidOptionError: they differ.
        """
        for rule in ("no_decay_1d", "no_adapt_1d"):
            said = getattr(self, rule)
            if None not in (said, exempt_1d) and said != exempt_1d:
                raise InvalidOptionError(
                    f"exempt_1d={exempt_1d} of the optimizer and {rule}={said} of the group rules contradict each "
                    "other about parameters with at most one dimension. Leave exempt_1d out, and set no_decay_1d and "
                    "no_adapt_1d."
                )


# Rules among a module's hyper-parameters lie in its checkpoints, which Lightning may read with weights_only=True.
torch.serialization.add_safe_globals([GroupRules])


@dataclass(frozen=True)
class Exemptions:
    """Who is exempt, by name: rules that have been matched with a model, its frozen parameters included.

    Attributes:
        no_decay: names without weight decay.
        no_adapt: names without a trust ratio.
        no_decay_1d: as in `GroupRules`.
        no_adapt_1d: as in `GroupRules`.
        weight_decay: of the others; None: the optimizer's.
        adapt: of the others; None: the optimizer's.
    """

    no_decay: frozenset[str]
    no_adapt: frozenset[str]
    no_decay_1d: bool | None
    no_adapt_1d: bool | None
    weight_decay: float | None
    adapt: bool | Literal["decayed"] | None

    def treatment(self, name: str, is_1d: bool, exempt_1d: bool) -> tuple[bool, bool]:
        """Whether a parameter decays, and whether it has a trust ratio.

        Args:
            name: of the parameter.
            is_1d: whether it has at most one dimension.
            exempt_1d: what holds where a rule leaves it open.
        """
        decay_1d = exempt_1d if self.no_decay_1d is None else self.no_decay_1d
        adapt_1d = exempt_1d if self.no_adapt_1d is None else self.no_adapt_1d
        return (
            not (name in self.no_decay or (is_1d and decay_1d)),
            not (name in self.no_adapt or (is_1d and adapt_1d)),
        )

    def groups(
        self, named: Sequence[tuple[str, Tensor]], shape_of: Callable[[Tensor], Sequence[int]], exempt_1d: bool = True
    ) -> list[RuledGroup]:
        """Groups of parameters that are treated alike, those with decay and ratio first; see `lamb_param_groups`."""
        found: dict[tuple[bool, bool, bool | None], RuledGroup] = {}
        for name, parameter in named:
            lazy = is_lazy(parameter)
            is_1d = not lazy and len(shape_of(parameter)) <= 1
            decays, adapts = self.treatment(name, is_1d, exempt_1d)
            # The optimizer looks at the shape of a lazy parameter when it has one.
            later = self._shape_rule_of_lazy(name, exempt_1d) if lazy else False
            options = {
                "weight_decay": (DEFAULT_DECAY if self.weight_decay is None else self.weight_decay) if decays else 0.0,
                "adapt": (True if self.adapt is None else self.adapt) if adapts else False,
                "exempt_1d": later,
            }
            key = (decays, adapts, not later)
            group = found.setdefault(key, RuledGroup({"params": [], **options}, self, shape_of))
            group["params"].append((name, parameter))
        return [found[key] for key in sorted(found, reverse=True)]

    def _shape_rule_of_lazy(self, name: str, exempt_1d: bool) -> bool:
        decays, adapts = self.treatment("", is_1d=True, exempt_1d=exempt_1d)
        if decays != adapts:
            raise InvalidOptionError(
                f"{name} has no shape yet (a lazy layer), and no_decay_1d and no_adapt_1d differ, so its group depends "
                "on the shape. Run one batch through the module before the optimizer is made, or set both alike."
            )
        return not decays


class RuledGroup(dict[str, Any]):
    """A parameter group as rules made it: where they leave something to the optimizer, the optimizer fills it in.

    A group that is copied into a plain dict is the user's own, and says what it says.
    """

    def __init__(
        self, group: Mapping[str, Any], exemptions: Exemptions, shape_of: Callable[[Tensor], Sequence[int]]
    ) -> None:
        super().__init__(group)
        self.exemptions = exemptions
        self.shape_of = shape_of
        self.made = {key: value for key, value in group.items() if key != "params"}

    def settled(self, exempt_1d: bool) -> list[RuledGroup]:
        """This group where shape rules that were left open are decided.

        Args:
            exempt_1d: what they become.
        """
        if not self._is_named:
            return [self]
        open_rules = [rule for rule in ("no_decay_1d", "no_adapt_1d") if getattr(self.exemptions, rule) is None]
        exemptions = replace(self.exemptions, **dict.fromkeys(open_rules, exempt_1d))  # type: ignore[arg-type]
        parts = exemptions.groups(self["params"], self.shape_of)
        for part in parts:
            part.update(self._changed)
        return parts

    @property
    def _is_named(self) -> bool:
        return all(isinstance(member, tuple) for member in self["params"])

    @property
    def _changed(self) -> dict[str, Any]:
        """The keys that the user wrote or changed."""
        return {key: value for key, value in self.items() if key != "params" and self.made.get(key, self) != value}

    def completed(self, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
        """This group with the optimizer's options; several, where they treat its parameters differently.

        Args:
            defaults: the optimizer's.
        """
        if not self._is_named:
            return [dict(self)]
        exempt_1d = bool(defaults.get("exempt_1d", True))
        parts = self.exemptions.groups(self["params"], self.shape_of, exempt_1d)
        for part in parts:
            if self.exemptions.weight_decay is None and part["weight_decay"] != 0:
                part["weight_decay"] = defaults.get("weight_decay", DEFAULT_DECAY)
            if self.exemptions.adapt is None and part["adapt"]:
                part["adapt"] = defaults.get("adapt", True)
            part.update(self._changed)
        return [dict(part) for part in parts]


def settle(params: Any, exempt_1d: bool) -> Any:
    """Groups of `lamb_param_groups` with open shape rules decided; anything else as it is.

    Args:
        params: what an optimizer takes.
        exempt_1d: whether parameters with at most one dimension are exempt where no rule says it.
    """
    if not isinstance(params, (list, tuple)) or not any(isinstance(group, RuledGroup) for group in params):
        return params
    return [
        part for group in params for part in (group.settled(exempt_1d) if isinstance(group, RuledGroup) else [group])
    ]


def lamb_param_groups(
    model: nn.Module | NamedParameters,
    *,
    weight_decay: float | None = None,
    adapt: bool | Literal["decayed"] | None = None,
    rules: GroupRules | None = None,
    shape_of: Callable[[Tensor], Sequence[int]] = lambda parameter: parameter.shape,
    clean: Callable[[str], str] = lambda name: name,
) -> list[dict[str, Any]]:
    """Parameter groups for `Lamb` and `Lars`, at most one for each combination of decay and adaptation.

    What is left out here follows the optimizer: ``Lamb(lamb_param_groups(model), adapt=False, exempt_1d=False)`` means
    the same as without the groups. Parameters that are added to the optimizer later are treated by the same rules.

    Args:
        model: a module, or (name, parameter) pairs where no rule names a module type. Frozen parameters are left out,
            tied ones appear once.
        weight_decay: of the parameters that no rule exempts; None: the optimizer's.
        adapt: of the parameters that no rule exempts; None: the optimizer's.
        rules: who is exempt; by default what has at most one dimension, unless the optimizer has exempt_1d=False.
        shape_of: the true shape of a parameter; `sharding.true_shape` where parameters are slices.
        clean: makes a parameter's true name of the one in ``model``; `sharding.clean_name` for wrapped models.

    Returns:
        Groups with ``params`` (a list of (name, parameter)), ``weight_decay``, ``adapt`` and ``exempt_1d=False``: the
        shape rule has been applied (for lazy parameters ``exempt_1d`` may be True: the optimizer applies it).

    Raises:
        InvalidOptionError: a pattern or type that matches nothing; types without a module; rules that are no
            GroupRules; parameters without their names; a lazy layer whose group depends on its shape.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> for group in lamb_param_groups(model):
    ...     print([name for name, _ in group["params"]], group["weight_decay"], group["adapt"])
    ['0.weight'] 0.01 True
    ['0.bias', '1.weight', '1.bias'] 0.0 False
    """
    rules = GroupRules() if rules is None else rules
    if not isinstance(rules, GroupRules):
        raise InvalidOptionError(f"rules={rules!r} must be GroupRules(...), not a {type(rules).__name__}.")
    pairs = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    if any(isinstance(pair, Tensor) for pair in pairs):
        raise InvalidOptionError("parameters come without names: pass the module, or its named_parameters().")
    named = [(clean(name), parameter) for name, parameter in pairs]
    exemptions = Exemptions(
        _matching(model, named, rules.no_decay_names, rules.no_decay_types, "no_decay"),
        _matching(model, named, rules.no_adapt_names, rules.no_adapt_types, "no_adapt"),
        rules.no_decay_1d,
        rules.no_adapt_1d,
        weight_decay,
        adapt,
    )
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    return list(exemptions.groups(trained, shape_of))


def _matching(
    model: nn.Module | NamedParameters,
    named: Sequence[tuple[str, Tensor]],
    patterns: Sequence[str],
    types: Sequence[Any],
    option: str,
) -> frozenset[str]:
    """Names of the parameters that a name pattern or a module type matches, frozen ones included."""
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name, _ in named if re.search(pattern, name)}
        if not matches:
            raise InvalidOptionError(
                f"{option}_names: {pattern!r} matches none of the {len(named)} parameter names, such as "
                f"{', '.join(name for name, _ in named[:5])}. Correct or remove it."
            )
        found |= matches
    names = {id(parameter): name for name, parameter in named}
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
        found |= {names[id(parameter)] for module in modules for parameter in module.parameters()}
    return frozenset(found)


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
