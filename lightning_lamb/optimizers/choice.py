"""Which kernel computes a group's step: what was asked for, else the fastest that can."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.kernels import Kernel, cpu, cpu_library, eager, foreach

if TYPE_CHECKING:
    from lightning_lamb.optimizers.plan import Slot

Together = Literal["one", "cached", "all"]
"""How many whole layers a kernel takes at a time: one; as many as the cache holds; all."""

_warned = False


def kernel_for(group: Mapping[str, Any], slots: Sequence[Slot], is_narrow: bool) -> tuple[Kernel, Together]:
    """The implementation that computes the local passes of these slots.

    Args:
        group: theirs.
        slots: on one device, of one dtype.
        is_narrow: whether their moments are in bfloat16, which the multi-tensor form does not do.

    Raises:
        InvalidOptionError: ``fused=True`` where no fused kernel works.
    """
    if group["fused"] or (group["fused"] is None and group["foreach"] is None and not group["differentiable"]):
        fused = _fused(group, slots)
        if fused is not None:
            return fused, "all"
    use_foreach = not group["differentiable"] if group["foreach"] is None else group["foreach"]
    if use_foreach and not is_narrow:
        return foreach, "cached"
    return eager, "one"


def refuse_impossible(group: Mapping[str, Any], parameter: Tensor, name: str) -> None:
    """Checks ``fused=True`` as soon as a parameter is known.

    Raises:
        InvalidOptionError: no fused kernel works on it here.
    """
    if group["fused"] and parameter.device.type != "meta":  # meta: not there yet
        _refuse(name, _missing(parameter.device, parameter.dtype))


def _fused(group: Mapping[str, Any], slots: Sequence[Slot]) -> Kernel | None:
    """The fused kernel for these slots; None where it was not asked for by name and is not the better choice."""
    first = slots[0]
    local = [slot.piece.view(slot.parameter) for slot in slots]
    if not group["fused"]:
        # Not on CUDA: there the Triton kernel has been checked, but not measured.
        automatic = first.device.type == "cpu" and cpu.suits(local)
        return cpu if automatic and _has_library() else None
    _refuse(first.piece.layer.name, _missing(first.device, first.parameter.dtype))
    kernel = cpu if first.device.type == "cpu" else _triton_kernel()
    odd = next((tensor for tensor in local if not kernel.suits([tensor])), None)
    if odd is not None:
        reason = f"the kernel reads memory directly, and a {type(odd).__name__} may not be what its memory says"
        _refuse(first.piece.layer.name, reason)
    return kernel


def _missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no fused kernel for these parameters here, or None if there is one."""
    if dtype not in cpu.TYPES:
        return f"there is no fused kernel for {dtype}"
    if device.type == "cpu":
        return cpu_library.missing_because()
    if device.type == "cuda":
        try:
            _triton_kernel()
        except ImportError as error:
            return f"the kernel for CUDA is written in Triton, which cannot be imported ({error})"
        return None
    return f"there is no fused kernel for devices of type {device.type}"


def _refuse(name: str, missing: str | None) -> None:
    if missing is not None:
        raise InvalidOptionError(
            f"fused=True for {name}: {missing}. Or leave fused unset: the same step is then computed by foreach."
        )


def _has_library() -> bool:
    """Whether there is a CPU kernel; says once per process if there could be one."""
    global _warned  # noqa: PLW0603
    missing = cpu_library.missing_because()
    if missing is not None and not _warned and not cpu_library.switched_off():
        _warned = True
        warnings.warn(
            f"No fused CPU kernel: {missing}. The step is computed by foreach instead, with the same result, about 4 "
            f"times slower. {cpu_library.SWITCH}=0 silences this message.",
            stacklevel=2,
        )
    return missing is None


def _triton_kernel() -> Any:
    from lightning_lamb.kernels import triton

    return triton
