"""Is this value what the option means? Checks of numbers that come from Python, YAML, JSON or a command line.

Every function returns the value it was given (as ``int`` or ``float``) or raises
:class:`~lightning_lamb.errors.InvalidOptionError` naming the option, the value and the remedy.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from lightning_lamb.errors import InvalidOptionError

Choice = TypeVar("Choice", bound=str)


def whole_number(option: str, value: Any, *, at_least: int = 1) -> int:
    """Check a count (batch sizes, steps, ranks).

    Args:
        option: The option's name, for the message.
        value: What the user gave. ``True`` and ``512.0`` are refused: they are not counts.
        at_least: The smallest value that makes sense.

    Raises:
        InvalidOptionError: ``value`` is no whole number, or too small.

    Example:
        >>> whole_number("micro_batch_size", 32)
        32
        >>> whole_number("micro_batch_size", 0)
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: micro_batch_size=0 must be a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise InvalidOptionError(f"{option}={value!r} must be a whole number of at least {at_least}.")
    return int(value)


def finite_number(
    option: str, value: Any, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> float:
    """Check a real number: finite, not NaN, and ``above < value``, ``at_least <= value <= at_most``.

    Args:
        option: The option's name, for the message.
        value: What the user gave.
        at_least: Smallest allowed value.
        above: Largest value that is too small.
        at_most: Largest allowed value.

    Raises:
        InvalidOptionError: ``value`` is no number, not finite, or outside the range.

    Example:
        >>> finite_number("base_lr", 0.005, above=0.0)
        0.005
        >>> finite_number("base_lr", "5e-3", above=0.0)
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: base_lr='5e-3' is text, not a number. Write 0.005 without quotes (YAML reads 1e-3 as text, 1.0e-3 as a number).
    """  # noqa: E501  # a doctest's expected message cannot be wrapped
    if isinstance(value, str):
        message = f"{option}={value!r} is text, not a number."
        meant = _number_in(value)
        if meant is not None:
            # YAML 1.1 knows 1.0e-06 as a number, but not 1e-06.
            digits = repr(meant) if "." in repr(meant) else repr(meant).replace("e", ".0e")
            message += f" Write {digits} without quotes (YAML reads 1e-3 as text, 1.0e-3 as a number)."
        raise InvalidOptionError(message)
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and above < number and at_least <= number <= at_most):
        bounds = [
            f"above {above:g}" if above > -math.inf else "",
            f"of at least {at_least:g}" if at_least > -math.inf else "",
            f"of at most {at_most:g}" if at_most < math.inf else "",
        ]
        wanted = " and ".join(bound for bound in bounds if bound)
        raise InvalidOptionError(f"{option}={value!r} must be a finite number{' ' + wanted if wanted else ''}.")
    return number


def one_of(option: str, value: Choice, choices: Iterable[str]) -> Choice:
    """Check a choice among names; the message lists them and proposes the nearest.

    Raises:
        InvalidOptionError: ``value`` is none of ``choices``.

    Example:
        >>> one_of("lr_scaling", "squrt", ["sqrt", "linear", "none"])
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: lr_scaling='squrt' is not one of: sqrt, linear, none. Did you mean 'sqrt'?
    """  # noqa: E501  # a doctest's expected message cannot be wrapped
    names, given = list(choices), cast("Any", value)  # YAML may hold anything
    if not isinstance(given, str) or value not in names:
        raise InvalidOptionError(f"{option}={value!r} is not one of: {', '.join(names)}.{did_you_mean(value, names)}")
    return value


def regular_expression(option: str, value: str) -> re.Pattern[str]:
    """Compile a pattern.

    Raises:
        InvalidOptionError: ``value`` is no regular expression.

    Example:
        >>> regular_expression("no_decay_names", "bias(")
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: no_decay_names: 'bias(' is no regular expression (missing ), unterminated subpattern at position 4).
    """  # noqa: E501  # a doctest's expected message cannot be wrapped
    try:
        return re.compile(value)
    except re.error as error:
        raise InvalidOptionError(f"{option}: {value!r} is no regular expression ({error}).") from error


def options_of_call(option: str, given: Mapping[str, Any], call: Callable[..., Any]) -> dict[str, Any]:
    """Check keyword arguments against the signature of what will take them; the message names the nearest one.

    Args:
        option: The name of the mapping, for the message.
        given: Argument names and values.
        call: A class or function, whose first argument is not among them. If it takes any keyword, all are fine.

    Raises:
        InvalidOptionError: ``given`` is no mapping, or ``call`` has no argument of one of its names.

    Example:
        >>> options_of_call("lamb_options", {"weight_decai": 0.1}, lambda params, lr, weight_decay: None)
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: lamb_options: unknown key 'weight_decai'. Did you mean 'weight_decay'? Known: lr, weight_decay.
    """  # noqa: E501  # a doctest's expected message cannot be wrapped
    if not isinstance(given, Mapping):
        raise InvalidOptionError(f"{option}={given!r} must be a dict of option names and values.")
    arguments = list(inspect.signature(call).parameters.values())
    known = [argument.name for argument in arguments[1:] if argument.kind is not argument.VAR_KEYWORD]
    if len(known) == len(arguments[1:]):
        for key in given:
            if key not in known:
                message = f"{option}: unknown key {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}."
                raise InvalidOptionError(message)
    return dict(given)


def did_you_mean(name: Any, names: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of ``names``, or nothing."""
    nearest = difflib.get_close_matches(str(name).lower(), list(names), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _number_in(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
