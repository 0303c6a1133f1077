"""DTensor: FSDP2, HSDP, tensor parallel, and FSDP2 with tensor parallel.

The parameter shows its true shape, and its placements say along which axes of the mesh it is cut. Norms of DTensors
are right by themselves, but cost one collective each (200 for 50 layers); here each rank takes its local tensor and all
partial norms travel together.
"""

from __future__ import annotations

import sys
from typing import Any, Optional

from lightning_lamb.errors import UnknownShardError
from lightning_lamb.sharding.layout import Layer, Piece, Split


def locate(parameter: Any, name: str) -> Optional[list[Piece]]:
    """The local piece of a DTensor; None for a plain tensor.

    Raises:
        UnknownShardError: a placement that is a partial sum: its elements are no weights yet.
    """
    if not is_dtensor(parameter):
        return None
    placements, mesh = parameter.placements, parameter.device_mesh
    if any(placement.is_partial() for placement in placements):
        raise UnknownShardError(
            f"{name}: a DTensor with placements {placements} on mesh {tuple(mesh.shape)} holds partial sums, not "
            "elements of the weight. Redistribute it to Shard or Replicate before the optimizer sees it."
        )
    # `_StridedShard.is_shard()` is False in torch 2.13 although it is one (FSDP2 over TP), hence "not replicated".
    axes = tuple(axis for axis, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(axis) > 1)
    split = Split(mesh=mesh, axes=axes) if axes else None
    return [Piece(Layer(name, tuple(parameter.shape)), view=_local, split=split)]


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a DTensor, without importing DTensor: nobody can hold one before it is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def aligned_gradient(parameter: Any, grad: Any, name: str) -> Any:
    """``grad`` laid out like ``parameter``.

    Tensor parallelism can leave the gradient of a replicated weight as a partial sum; adding it up costs a collective
    for that tensor, as it does in every optimizer. No communication where the placements agree.

    Raises:
        UnknownShardError: a plain gradient on a DTensor parameter.
    """
    if not is_dtensor(parameter):
        return grad
    if not is_dtensor(grad):
        raise UnknownShardError(
            f"{name}: the parameter is a DTensor but its gradient is a plain tensor of shape {tuple(grad.shape)}; "
            "which slice it belongs to is unknown. Assign gradients as DTensors (`distribute_tensor`)."
        )
    if grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return grad


def _local(tensor: Any) -> Any:
    return tensor.to_local() if is_dtensor(tensor) else tensor
