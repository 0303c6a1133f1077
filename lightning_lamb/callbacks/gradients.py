"""Multiplies and clamps the gradients of an optimizer where they lie, whatever the sharding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.optimizers.gradients import refuse_unusable
from lightning_lamb.optimizers.plan import parameter_name


def local_gradients(optimizer: Optimizer) -> list[Tensor]:
    """All gradients of ``optimizer``, of a DTensor this rank's piece; views, so writing changes them."""
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                gradients.append(gradient.to_local() if hasattr(gradient, "to_local") else gradient)
    return gradients


def refuse_unusable_gradients(optimizer: Optimizer) -> None:
    """Refuses what has no norm or cannot be clamped, before anything is changed.

    Raises:
        UnsupportedGradientError: a sparse or complex gradient.
    """
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter.grad is not None and (parameter.grad.layout != torch.strided or parameter.grad.is_complex()):
                refuse_unusable(parameter.grad, parameter_name(group, index, position))


@torch.no_grad()
def multiply_gradients(optimizer: Optimizer, factor: float | Tensor) -> None:
    """Multiplies every gradient by one number, in place. No communication, no host synchronisation.

    Args:
        optimizer: its parameters' ``grad`` are modified in place.
        factor: a number, or a 0-dim tensor on the gradients' device.
    """
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in local_gradients(optimizer):
        by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), gradients in by_kind.items():
        # A float64 factor would make torch._foreach_mul_ refuse float32 gradients; a Python number is taken as it is.
        torch._foreach_mul_(gradients, factor.to(device, dtype) if isinstance(factor, Tensor) else factor)


@torch.no_grad()
def clip_by_norm(optimizer: Optimizer, max_norm: float | Tensor) -> Tensor:
    """Scales all gradients so that their global norm, over all shards, is at most ``max_norm``.

    Args:
        optimizer: a Lamb or Lars, which know the exact norm (one all-reduce per process group of shards).
        max_norm: the largest norm that stays unchanged.

    Returns:
        The norm before clipping, a 0-dim tensor.
    """
    norm: Tensor = optimizer.global_grad_norm()  # type: ignore[attr-defined]
    # coefficient = 1 / max(1, ||g|| / max_norm): no epsilon, so gradients below the bound stay bitwise what they were
    multiply_gradients(optimizer, 1.0 / (norm / max_norm).clamp(min=1.0))
    return norm


@torch.no_grad()
def clip_by_value(optimizer: Optimizer, bound: float | Tensor, *, keeps_overflow: bool = False) -> None:
    """Clamps every gradient element to [-bound, bound], in place. Exact under sharding without communication.

    Args:
        optimizer: its parameters' ``grad`` are modified in place.
        bound: the largest magnitude, a number or a 0-dim tensor.
        keeps_overflow: whether an infinite gradient becomes NaN instead of the bound, because whether a GradScaler's
            step is skipped, on all ranks, has yet to be decided.
    """
    for gradient in local_gradients(optimizer):
        if keeps_overflow:
            gradient.add_(gradient * 0)
        gradient.clamp_(-bound, bound)  # type: ignore[arg-type]  # two numbers or two tensors
