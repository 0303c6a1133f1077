"""DTensor: FSDP2, HSDP, tensor parallel, and FSDP2 with tensor parallel.

The parameter shows its true shape, and its placements say along which axes of the mesh it is cut. Norms of DTensors
are right by themselves, but cost one collective each (200 for 50 layers); here each rank takes its local tensor and all
partial norms travel together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.errors import UnknownShardError
from lightning_lamb.sharding.layout import Layer, Piece, Split


def locate(parameter: Any, name: str) -> list[Piece] | None:
    """The local piece of a DTensor; None for a plain tensor.

    Raises:
        UnknownShardError: a placement that is a partial sum: its elements are no weights yet.
    """
    if not is_dtensor(parameter):
        return None
    placements, mesh = parameter.placements, parameter.device_mesh
    if any(placement.is_partial() for placement in placements):
        raise UnknownShardError(
            f"{name}: rank {torch.distributed.get_rank()} holds a DTensor with placements {placements} on mesh "
            f"{tuple(mesh.shape)}: partial sums, not elements of the weight. Redistribute it to Shard or Replicate "
            "before the optimizer sees it."
        )
    # `_StridedShard.is_shard()` is False in torch 2.13 although it is one (FSDP2 over TP), hence "not replicated".
    axes = tuple(
        axis for axis, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(axis) > 1
    )
    split = Split(mesh=mesh, axes=axes) if axes else None
    return [Piece(Layer(name, tuple(parameter.shape)), view=_local, split=split)]


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, without importing DTensor: nobody can hold one before it is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_plain_gradient(parameter: Any, grad: Any, name: str) -> None:
    """Raises for a plain gradient on a DTensor parameter: which slice it belongs to is unknown.

    Raises:
        UnknownShardError: always for those, never for others.
    """
    if is_dtensor(parameter) and not is_dtensor(grad):
        raise UnknownShardError(
            f"{name}: on rank {torch.distributed.get_rank()} the parameter is a DTensor but its gradient is a plain "
            f"tensor of shape {tuple(grad.shape)}; which slice it belongs to is unknown. Assign gradients as DTensors "
            "(`distribute_tensor`)."
        )


def completed_gradients(parameters: Sequence[Any]) -> dict[int, Tensor]:
    """Local gradients, laid out like their parameters, where the two differ.

    Tensor parallelism leaves the gradients of replicated weights (norm scales under SequenceParallel) as partial sums.
    They are packed and added up together: one all-reduce per mesh axis and dtype, none where there are no such
    gradients. ``p.grad`` is not modified. Any other difference is redistributed by itself, at a collective each.

    Args:
        parameters: with their gradients, in the same order on every rank.

    Returns:
        id of the parameter to local gradient, for those parameters only.
    """
    found: dict[int, Tensor] = {}
    partial: dict[Any, list[Any]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None or not is_dtensor(grad) or grad.placements == parameter.placements:
            continue
        axes = _summed_axes(parameter, grad)
        if axes is None:
            found[id(parameter)] = _local(grad.redistribute(placements=parameter.placements))
        else:
            partial.setdefault((grad.device_mesh, axes, grad.dtype), []).append(parameter)
    for (mesh, axes, _), members in partial.items():
        locals_ = [_local(parameter.grad) for parameter in members]
        packed = torch.cat([local.reshape(-1) for local in locals_])
        for axis in axes:
            torch.distributed.all_reduce(packed, group=mesh.get_group(axis))
        parts = packed.split([local.numel() for local in locals_])
        for parameter, local, part in zip(members, locals_, parts):
            found[id(parameter)] = part.view(local.shape)
    return found


def _summed_axes(parameter: Any, grad: Any) -> tuple[int, ...] | None:
    """Mesh axes along which the gradient is a sum of parts and the parameter a copy; None if they differ otherwise."""
    if grad.device_mesh != parameter.device_mesh:
        return None
    axes = []
    for axis, (ours, theirs) in enumerate(zip(parameter.placements, grad.placements)):
        if ours == theirs:
            continue
        if not (ours.is_replicate() and theirs.is_partial() and theirs.reduce_op == "sum"):
            return None
        axes.append(axis)
    return tuple(axes)


def _local(tensor: Any) -> Any:
    if not is_dtensor(tensor):
        return tensor
    if torch.is_grad_enabled():
        return tensor.to_local()
    local = tensor._local_tensor  # to_local() would wrap it as a new Parameter, at every look
    return local.wait() if hasattr(local, "wait") else local  # AsyncCollectiveTensor: still on its way
