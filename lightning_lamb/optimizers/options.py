"""Checks of hyper-parameters: every message names option, value and remedy, before anything trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from lightning_lamb.checks import finite_number
from lightning_lamb.errors import InvalidOptionError

CHOICES: dict[str, tuple[Any, ...]] = {
    "bias_correction": (True, False, "lr"),
    "nesterov": (None, "first", "both"),
    "norm": ("l2", "l1", "linf"),
    "adapt": (True, False, "decayed"),
    "exempt_1d": (True, False),
    "maximize": (True, False),
    "foreach": (None, True, False),
    "fused": (None, True, False),
    "state_dtype": (None, "bfloat16"),
    "capturable": (True, False),
    "differentiable": (True, False),
}


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of one parameter group, with lists from YAML or JSON made tuples.

    Raises:
        InvalidOptionError: a value or a combination that cannot be meant.
    """
    result = {name: _plain(value) for name, value in options.items()}
    _check_lr(result["lr"])
    for name in ("eps", "weight_decay"):
        if name in result:
            _check_number(name, result[name], "a number >= 0", low=0.0)
    for name in ("max_grad_norm", "max_grad_value"):
        if result.get(name) is not None:
            remedy = "a number > 0, or None for no clipping (0 would wipe the gradient out)"
            _check_number(name, result[name], remedy, low=0.0, low_open=True)
    if "betas" in result:
        result["betas"] = _checked_betas(result["betas"])
    if "momentum" in result:
        _check_number("momentum", result["momentum"], "a number in [0, 1)", low=0.0, high_open=1.0)
    for name in ("weight_norm_bounds", "trust_ratio_bounds"):
        result[name] = _checked_bounds(name, result.get(name))
    for name, allowed in CHOICES.items():
        if name in result and not any(result[name] is value or _same_text(result[name], value) for value in allowed):
            raise InvalidOptionError(f"{name}={result[name]!r}: choose one of {', '.join(map(repr, allowed))}.")
    _check_combinations(result)
    return result


def one_limit(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """The ``max_grad_norm`` that all groups share, or None.

    Raises:
        InvalidOptionError: groups that differ.
    """
    limits = list(dict.fromkeys(group["max_grad_norm"] for group in groups))
    if len(limits) > 1:
        raise InvalidOptionError(
            f"max_grad_norm differs between parameter groups ({', '.join(map(str, limits))}): the norm is that of all "
            "gradients together, so there is one limit. Set the same value in every group."
        )
    return limits[0] if limits else None


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's: ``torch.load(weights_only=True)`` refuses the former in a state dict."""
    if value.__class__ in (bool, int, float) or not isinstance(value, Real):
        return value
    return float(value)


def _check_lr(lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise InvalidOptionError(
                f"lr is a tensor of shape {tuple(lr.shape)}: give a float or a tensor of one element."
            )
        return  # its value may live on a device; reading it here would wait for that device
    _check_number("lr", lr, "a number >= 0", low=0.0)


def _check_number(
    name: str, value: Any, remedy: str, low: float = -math.inf, high_open: float = math.inf, low_open: bool = False
) -> None:
    if isinstance(value, str):
        finite_number(name, value)  # its message says how YAML wants a number written
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < low or value >= high_open or (low_open and value == low):
        raise InvalidOptionError(f"{name}={value!r}: expected {remedy}.")


def _checked_betas(betas: Any) -> tuple[float, float]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise InvalidOptionError(f"betas={betas!r}: expected two numbers, as in betas=(0.9, 0.999).")
    for index, beta in enumerate(betas):
        _check_number(f"betas[{index}]", beta, "a number in [0, 1)", low=0.0, high_open=1.0)
    return float(betas[0]), float(betas[1])


def _checked_bounds(name: str, bounds: Any) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise InvalidOptionError(f"{name}={bounds!r}: expected two numbers (low, high), or None for no bounds.")
    low, high = bounds
    for position, bound in (("low", low), ("high", high)):
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or math.isnan(bound) or bound < 0:
            raise InvalidOptionError(f"{name}={bounds!r}: the {position} bound must be a number >= 0.")
    if low > high:
        raise InvalidOptionError(f"{name}={bounds!r}: the low bound is above the high bound; swap them.")
    return float(low), float(high)


def _check_combinations(options: Mapping[str, Any]) -> None:
    if options.get("bias_correction") == "lr" and options.get("nesterov") is not None:
        raise InvalidOptionError(
            f"nesterov={options['nesterov']!r} with bias_correction='lr': Algorithms 3 and 4 define no correction of "
            "the learning rate. Use bias_correction=True or False."
        )
    if options.get("differentiable") and (options.get("foreach") or options.get("fused") or options.get("capturable")):
        raise InvalidOptionError(
            "differentiable=True keeps the autograd graph, which only the eager form can: leave foreach, fused and "
            "capturable unset."
        )
    if options.get("foreach") and options.get("fused"):
        raise InvalidOptionError(
            "foreach=True and fused=True are two implementations of the same step: set one of them."
        )


def _same_text(value: Any, allowed: Any) -> bool:
    return isinstance(value, str) and isinstance(allowed, str) and value == allowed
