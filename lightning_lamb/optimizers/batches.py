"""Sorts slots into batches that one kernel call can take, and says which kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from lightning_lamb.equations import Coefficients
from lightning_lamb.kernels import Batch, Kernel, Options, eager, foreach
from lightning_lamb.optimizers.gradients import local_gradient
from lightning_lamb.optimizers.plan import Slot

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

WHOLE_BATCH_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Whole layers are applied right after their direction is known. On a CPU a batch of small layers that fits the cache is
read from memory once; on a GPU fewer, larger launches win. A larger layer is a batch of its own."""


def batches_of(
    slots: Sequence[Slot],
    optimizer: LayerwiseOptimizer,
    coefficients: dict[int, Coefficients],
    grad_scale: Optional[Tensor],
    whole: bool = True,
) -> Iterator[tuple[Batch, list[Slot]]]:
    """Yields batches of slots that share group, exemption, device and dtype.

    Args:
        slots: with a gradient each.
        optimizer: whose state and groups they are.
        coefficients: of this step, by id of the parameter.
        grad_scale: clip coefficient, or None.
        whole: cut batches to `WHOLE_BATCH_BYTES`, so that updates of few layers exist at a time.
    """
    alike: dict[Any, list[Slot]] = {}
    for slot in slots:
        alike.setdefault((slot.group, slot.adapt, slot.weight_decay, slot.device, slot.parameter.dtype), []).append(slot)
    for members in alike.values():
        one_by_one = whole and not use_foreach(optimizer.param_groups[members[0].group])
        limit = 0 if one_by_one else WHOLE_BATCH_BYTES.get(members[0].device.type, 1 << 28) if whole else None
        for part in _parts(members, limit):
            yield _batch(part, optimizer, coefficients, grad_scale), part


def options_of(slot: Slot, optimizer: LayerwiseOptimizer) -> Options:
    """The options that the slot's batch shares."""
    group = optimizer.param_groups[slot.group]
    beta1, beta2 = optimizer.moment_decays(group)
    return Options(
        base=optimizer.base,
        beta1=beta1,
        beta2=beta2,
        eps=group.get("eps", 0.0),
        weight_decay=slot.weight_decay,
        norm=slot.norm,
        adapt=slot.adapt,
        maximize=group["maximize"],
        max_grad_value=group["max_grad_value"],
        differentiable=group["differentiable"],
    )


def use_foreach(group: dict[str, Any]) -> bool:
    """Whether the group's step is computed by the multi-tensor kernel: unless told otherwise, where it can be."""
    if group["foreach"] is not None:
        return bool(group["foreach"])
    return not group["differentiable"]


def kernel_for(group: dict[str, Any]) -> Kernel:
    """The implementation that computes this group's local passes."""
    return foreach if use_foreach(group) else eager


def _parts(slots: list[Slot], limit: Optional[int]) -> Iterator[list[Slot]]:
    part: list[Slot] = []
    size = 0
    for slot in slots:
        bytes_here = slot.parameter.numel() * slot.parameter.element_size()
        if part and limit is not None and size + bytes_here > limit:
            yield part
            part, size = [], 0
        part.append(slot)
        size += bytes_here
    if part:
        yield part


@torch.compiler.disable  # Dynamo would guard on the identity of gradients, which are new tensors at every step
def _batch(
    slots: list[Slot],
    optimizer: LayerwiseOptimizer,
    coefficients: dict[int, Coefficients],
    grad_scale: Optional[Tensor],
) -> Batch:
    states = [optimizer.state[slot.parameter] for slot in slots]
    views = [slot.piece.view for slot in slots]
    grads = [local_gradient(slot) for slot in slots]
    return Batch(
        options=options_of(slots[0], optimizer),
        weights=[optimizer.full_weight(slot) for slot in slots],
        grads=[grad for grad in grads if grad is not None],
        moments1=[view(state["exp_avg"]) for view, state in zip(views, states)],
        moments2=[view(state["exp_avg_sq"]) for view, state in zip(views, states) if "exp_avg_sq" in state],
        coefficients=[coefficients[id(slot.parameter)] for slot in slots],
        grad_scale=None if grad_scale is None else grad_scale.to(slots[0].device),
    )
