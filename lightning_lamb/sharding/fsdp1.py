"""FSDP1 (``FullyShardedDataParallel``): each rank sees a 1-D, possibly empty slice of every layer.

``p.shape`` and ``p.ndim`` of such a slice say nothing about the layer, and the slice has no way back to its unit. So
the wrapped module is read once (`annotate`), and an optimizer that meets a slice without annotation refuses to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_lamb.errors import UnknownShardError
from lightning_lamb.sharding.layout import Layer, Piece, Split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def flat_slices(module: nn.Module) -> Iterator[tuple[Tensor, tuple[int, ...], ProcessGroup | None, str]]:
    """Yields (slice, true shape, process group or None if unsharded, name in its unit) for each FSDP1 parameter.

    Raises:
        UnknownShardError: a unit with ``use_orig_params=False``.
    """
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    for unit in FullyShardedDataParallel.fsdp_modules(module):
        handle = unit._handle
        if handle is None:
            continue
        flat = handle.flat_param
        if flat._params is None:
            raise UnknownShardError(_merged_message(flat))
        if any(extension is not None for extension in getattr(flat, "_param_extensions", None) or ()):
            raise UnknownShardError(
                f"{', '.join(flat._fqns)}: FSDP1 over tensor parallelism cuts layers twice, and its units know one of "
                "the two cuts. Use fully_shard (FSDP2) with tensor parallelism; in Lightning ModelParallelStrategy."
            )
        group = handle.process_group if handle.uses_sharded_strategy else None
        for parameter, shape, name in zip(flat._params, flat._shapes, flat._fqns):
            yield parameter, tuple(shape), group, name
        # A parameter shared inside the unit appears once in `_params`; its other names point at the same object.


def locate(parameter: Tensor, name: str) -> list[Piece] | None:
    """The piece behind an annotated FSDP1 slice; None for anything else.

    Raises:
        UnknownShardError: an FSDP1 slice that nobody annotated, or a merged ``FlatParameter``.
    """
    from lightning_lamb.sharding.annotate import annotation

    known = annotation(parameter)
    if known is not None and known.shape is not None:
        split = None if known.group is None else Split(group=known.group)
        return [Piece(Layer(name, known.shape), split=split)]
    refuse_unannotated(parameter, name)
    return None


def refuse_unannotated(parameter: Tensor, name: str) -> None:
    """Raises for FSDP1 slices and flat parameters: their shape would be taken for the layer's.

    Raises:
        UnknownShardError: always for those, never for others.
    """
    if type(parameter).__name__ == "FlatParameter" or getattr(parameter, "_is_flat_param", False):
        raise UnknownShardError(_merged_message(parameter, name))
    if getattr(parameter, "_fsdp_flattened", False):
        raise UnknownShardError(
            f"{name}: rank {_rank()} holds {parameter.numel()} elements of an FSDP1 shard whose layer is unknown, so "
            "its norms and its shape rules would be those of the slice. Call `lightning_lamb.sharding.annotate(model)` "
            "with the FSDP-wrapped model (in Lightning trainer.strategy.model) before the first step; LambMixin, "
            "LargeBatch, LambCLI and CPUFSDPStrategy do it for you."
        )


def _merged_message(flat: Tensor, name: str = "flat_param") -> str:
    return (
        f"{name}: rank {_rank()} holds a FlatParameter of {flat.numel()} elements in which FSDP1 merged several "
        "layers; LAMB needs one norm per layer. Wrap with FullyShardedDataParallel(..., use_orig_params=True), "
        "in Lightning FSDPStrategy(use_orig_params=True), which is its default."
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
