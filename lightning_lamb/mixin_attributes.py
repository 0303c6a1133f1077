"""Whether the ``lamb_...`` attributes of a module mean something, and whether what it trains with uses them.

Names that begin with ``lamb_`` belong to `LambMixin` where their value is a plain one (a number, text, a dict or
list, a tensor, None): one that it does not know is a slip and is refused. Methods, properties, classes, layers,
parameters and other objects may be called so.
"""

from __future__ import annotations

import dis
import inspect
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lamb.checks import did_you_mean
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.optimizers import LayerwiseOptimizer, ShardedStateOptimizer
from lightning_lamb.param_groups import GroupRules
from lightning_lamb.schedules import StagedWarmup

PREFIX = "lamb_"
ATTRIBUTES = (
    "lamb_lr",
    "lamb_options",
    "lamb_group_rules",
    "lamb_schedule",
    "lamb_optimizer",
    "lamb_shard_optimizer_state",
)
METHODS = ("lamb_param_groups",)
SYNONYMS = {"learning_rate": "lamb_lr", "rate": "lamb_lr", "base_lr": "lamb_lr", "rules": "lamb_group_rules"}

USED = "_lamb_used"
"""In the module's ``__dict__`` while its own configure_optimizers runs: which parts of the mixin it called."""


# ---- unknown and hidden attributes


def refuse_unknown(module: Any, mixin: type) -> None:
    """Raises for an attribute that would be ignored.

    Args:
        module: whose classes and instance are looked at.
        mixin: `LambMixin`.

    Raises:
        InvalidOptionError: an unknown name, or one that the mixin's default hides.
    """
    after = type(module).__mro__[type(module).__mro__.index(mixin) + 1 :]
    for owner, name, value in _explicit(module, mixin):
        if name in ATTRIBUTES + METHODS:
            if owner in after:
                raise InvalidOptionError(
                    f"{name} of {owner.__name__} is hidden by LambMixin, which stands before it in "
                    f"{type(module).__name__}: set it in {type(module).__name__}."
                )
        elif _is_plain(value) or _is_nearly_a_method(name):
            known = ", ".join(ATTRIBUTES + METHODS)
            where = type(module).__name__ if owner is None else owner.__name__
            shown = f"={reprlib.repr(value)}" if _is_plain(value) else "()"
            raise InvalidOptionError(
                f"{name}{shown} of {where} is no attribute of LambMixin and would be ignored.{_meant(module, name)} "
                f"Known: {known}. (An attribute of your own needs a name without the prefix `{PREFIX}`.)"
            )


def set_attributes(module: Any, mixin: type) -> set[str]:
    """The names of the mixin's attributes that the user set."""
    return {name for _, name, _ in _explicit(module, mixin) if name in ATTRIBUTES}


def _explicit(module: Any, mixin: type) -> Iterator[tuple[type | None, str, Any]]:
    """(class or None for the instance, name, value) of everything that the user called ``lamb_...``."""
    for name, value in vars(module).items():
        if name.startswith(PREFIX):
            yield None, name, value
    for owner in type(module).__mro__:
        if owner is not mixin:
            yield from ((owner, name, value) for name, value in vars(owner).items() if name.startswith(PREFIX))


def _is_plain(value: Any) -> bool:
    """Whether it is data, rather than something that a class has for its own purposes."""
    kinds = (bool, int, float, complex, str, type(None), Mapping, list, tuple, set, Tensor, GroupRules)
    return isinstance(value, kinds) and not isinstance(value, nn.Parameter)


def _is_nearly_a_method(name: str) -> bool:
    """Whether a name is nearly that of a method to override."""
    return any(name in (method[:-1], method + "s", method.replace("param", "parameter")) for method in METHODS)


def _meant(module: Any, name: str) -> str:
    option = name.removeprefix(PREFIX)
    if option in SYNONYMS:
        return f" Did you mean {SYNONYMS[option]!r}?"
    for holder, call in (("lamb_options", module.lamb_optimizer), ("lamb_schedule", StagedWarmup)):
        if callable(call) and option in inspect.signature(call).parameters:
            return f" Did you mean {holder} = {{{option!r}: ...}}?"
    return did_you_mean(name, ATTRIBUTES + METHODS)


# ---- a configure_optimizers of the module's own


def note_use(module: Any, part: str) -> None:
    """Notes that a method of the mixin was called, if somebody wants to know."""
    used = vars(module).get(USED)
    if used is not None:
        used.add(part)


def checked_override(configure: Callable[..., Any], mixin: type) -> Callable[..., Any]:
    """``configure``, a configure_optimizers of the user's, followed by a look at what it made.

    Args:
        configure: a function of a class that inherits from the mixin.
        mixin: `LambMixin`.
    """

    def configure_optimizers(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self).get(USED) is not None:  # a subclass calls super(): it decides what becomes of this
            return configure(self, *args, **kwargs)
        used: set[str] = set()
        vars(self)[USED] = used
        try:
            made = configure(self, *args, **kwargs)
        finally:
            del vars(self)[USED]
        refuse_unknown(self, mixin)
        if "configure_optimizers" not in used:
            _refuse_other_optimizer(self, configure, made, used)
            _refuse_unused(self, mixin, used)
        return made

    # By hand, because functools.wraps would copy a mark that `configure` may carry.
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(configure_optimizers, name, getattr(configure, name, None))
    configure_optimizers.__wrapped__ = configure  # type: ignore[attr-defined]  # Lightning's is_overridden follows it
    configure_optimizers.is_checked = True  # type: ignore[attr-defined]
    return configure_optimizers


def _refuse_other_optimizer(module: Any, configure: Callable[..., Any], made: Any, used: set[str]) -> None:
    optimizers = list(_optimizers_in(made))
    if not optimizers or used or any(map(_is_ours, optimizers)) or "lamb_param_groups" in _words(configure):
        return
    name, kinds = type(module).__name__, ", ".join(type(optimizer).__name__ for optimizer in optimizers)
    raise ConflictError(
        f"{name} has LambMixin, and its own configure_optimizers returns {kinds} without using anything of the mixin, "
        f"so it would not train with LAMB. Delete {name}.configure_optimizers; or call super().configure_optimizers() "
        "or self.lamb_param_groups() in it; or leave LambMixin out."
    )


def _refuse_unused(module: Any, mixin: type, used: set[str]) -> None:
    """Raises for attributes that were set and that an own configure_optimizers leaves aside."""
    words = _words_of_classes(module, mixin)
    groups_used = bool(used) or "lamb_param_groups" in words
    for owner, name, value in _explicit(module, mixin):
        if name not in ATTRIBUTES or name in words:
            continue
        if groups_used and name == "lamb_group_rules":
            continue
        if groups_used and name == "lamb_options":
            if not isinstance(value, dict) or set(value) <= {"weight_decay", "adapt", "exempt_1d"}:
                continue
            value = {key: said for key, said in value.items() if key not in ("weight_decay", "adapt", "exempt_1d")}
        where = type(module).__name__ if owner is None else owner.__name__
        raise ConflictError(
            f"{name}={reprlib.repr(value)} of {where} has no effect: {type(module).__name__}.configure_optimizers uses "
            f"neither it nor super().configure_optimizers(). Remove {name}, or use it there."
        )


def refuse_unread_rules(module: Any, mixin: type) -> None:
    """Raises for group rules beside groups of the user's own, which are not made by them.

    Raises:
        ConflictError: ``lamb_group_rules`` was set, and an own ``lamb_param_groups`` does not use it.
    """
    groups = type(module).lamb_param_groups
    words = _words(groups)
    if groups is mixin.lamb_param_groups or "lamb_param_groups" in words:  # type: ignore[attr-defined]
        return
    if "lamb_group_rules" in set_attributes(module, mixin) and "lamb_group_rules" not in words:
        raise ConflictError(
            f"lamb_group_rules of {type(module).__name__} has no effect: its lamb_param_groups makes the groups "
            "without it. Remove one of them, or call super().lamb_param_groups()."
        )


def _optimizers_in(made: Any) -> Iterator[Any]:
    """The optimizers in what configure_optimizers returned, in whatever of Lightning's forms."""
    if isinstance(made, dict):
        yield from _optimizers_in(made.get("optimizer"))
    elif isinstance(made, (list, tuple)):
        for part in made:
            yield from _optimizers_in(part)
    elif isinstance(made, Optimizer) or (hasattr(made, "param_groups") and hasattr(made, "step")):
        yield made


def _is_ours(optimizer: Any) -> bool:
    """Whether it is ours, or wraps one that is."""
    ours = (LayerwiseOptimizer, ShardedStateOptimizer)
    return isinstance(optimizer, ours) or any(isinstance(value, ours) for value in vars(optimizer).values())


def _words_of_classes(module: Any, mixin: type) -> set[str]:
    """What the module's own code reads: attribute names, and texts, which may be a getattr's."""
    known = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_lamb", "builtins")
    classes = [
        owner for owner in type(module).__mro__ if owner is not mixin and owner.__module__.split(".")[0] not in known
    ]
    found: set[str] = set()
    for owner in classes:
        for value in vars(owner).values():
            found |= _words(value)
    return found


def _words(function: Any) -> set[str]:
    """Attributes that a function reads, global names, and texts in it; nothing of what it writes."""
    function = inspect.unwrap(function) if callable(function) else function
    function = getattr(function, "fget", getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    return set() if code is None else _words_of_code(code)


def _words_of_code(code: types.CodeType) -> set[str]:
    read = {
        str(instruction.argval)
        for instruction in dis.get_instructions(code)
        if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "LOAD_GLOBAL", "LOAD_NAME"))
    }
    for constant in code.co_consts:
        if isinstance(constant, str):
            read.add(constant)
        elif isinstance(constant, types.CodeType):
            read |= _words_of_code(constant)
    return read
