"""DeepSpeed ZeRO: one flat tensor per parameter group (stage 3: per sub-group) and rank, in which layers are invisible.

Which elements of which layer are in it follows from the parameters that the optimizer was built with (`adopt`), from
plain attributes that DeepSpeed hangs on them; DeepSpeed itself is not imported.

* ZeRO 1, 2 and BF16_Optimizer make the parameters of a group views of one flat buffer in the model's precision, cut
  into equal contiguous partitions. The optimizer's flat tensor is this rank's partition, in float32. So a parameter's
  offset in its storage says where it is, in any order and with any alignment. (DeepSpeed's own record of it,
  ``_hp_mapping``, is wrong under ``round_robin_gradients``.)
* ZeRO 3 cuts every parameter by itself and lays this rank's cuts one behind another; the last rank's is padded with
  uninitialised memory.
* Without partitions (stage 0 in half precision) there is one whole float32 copy per parameter.

What was worked out is checked before it is used: the segments of all ranks must tile every layer exactly once, and hold
what the model's weights say.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_lamb.errors import ConflictError, UnknownShardError
from lightning_lamb.sharding.agreement import Entry, compare
from lightning_lamb.sharding.layout import Layer, Piece, Split
from lightning_lamb.sharding.norms import NormTable

Named = Sequence[tuple[str, Tensor]]

IN_ONE_ORDER = (
    "DeepSpeed gathers weights in their order: give the optimizer the same layers in the same order on every rank; "
    "build groups from lists, not from sets, whose order is another in every process."
)


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a flat tensor; calling it gives that view."""

    start: int
    length: int

    def __call__(self, flat: Tensor) -> Tensor:
        """The segment of ``flat``, or of any tensor laid out like it."""
        return flat.view(-1).narrow(0, self.start, self.length)


@dataclass(frozen=True, eq=False)
class Fragment:
    """What a flat tensor should hold of one layer, on this rank.

    Attributes:
        layer: which layer.
        segment: where in the flat tensor; empty where this rank holds nothing of the layer.
        weights: the same elements as the model holds them; None where they are out of reach (on disk).
    """

    layer: Layer
    segment: Segment
    weights: Tensor | None


class _Origin:
    """The parameters behind a flat tensor, by weak reference: they refer to the tensor in turn."""

    def __init__(self, group: Named, everyone: Named) -> None:
        self._group = [(name, weakref.ref(parameter)) for name, parameter in group]
        self._everyone = [(name, weakref.ref(parameter)) for name, parameter in everyone]
        self.pieces: list[Piece] | None = None

    def group(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, reference()) for name, reference in self._group if reference() is not None)  # type: ignore[misc]

    def everyone(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, reference()) for name, reference in self._everyone if reference() is not None)  # type: ignore[misc]


# Weak and beside the tensor: an attribute of the tensor would be saved with it in checkpoints.
_ORIGINS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def adopt(flat: Tensor, group: Named, everyone: Named) -> None:
    """Records which parameters stood where the optimizer now finds ``flat``; `locate` works out the rest when asked.

    Args:
        flat: a tensor in a parameter group that is none of the optimizer's own parameters.
        group: names and original parameters of that group.
        everyone: names and original parameters of all groups.
    """
    if flat not in _ORIGINS:
        _ORIGINS[flat] = _Origin(group, everyone)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether ZeRO 1, 2 or 3 (or BF16_Optimizer) took ``parameter`` apart."""
    return hasattr(parameter, "_dp_group") or hasattr(parameter, "ds_id")


def locate(parameter: Tensor, name: str) -> list[Piece] | None:
    """The pieces in an adopted tensor, every layer of it on every rank; None for anything else.

    Communication: at the first call for a tensor, one all-reduce of two numbers to compare the layers with those of the
    other ranks, and one of two numbers per layer; the host reads them.

    Raises:
        RankDisagreementError: ranks were given other layers, or the same in another order.
        UnknownShardError: a layout that is not one of those above, or that fails the check; on all ranks.
        ConflictError: a set-up in which the ranks of a group do not step together.
    """
    origin = _ORIGINS.get(parameter)
    if origin is None:
        return None
    if origin.pieces is None:
        origin.pieces = _pieces(parameter, list(origin.group()), list(origin.everyone()), name)
    pieces: list[Piece] = origin.pieces
    return pieces


def stage3_of(parameters: Sequence[Tensor]) -> Any | None:
    """DeepSpeed's ZeRO-3 optimizer that holds ``parameters``, or None."""
    return next((parameter._z3_optimizer for parameter in parameters if hasattr(parameter, "_z3_optimizer")), None)


def forget_gradients(flat: Tensor) -> None:
    """Zeroes ZeRO's gradient memory behind ``flat`` once it has been used for a step.

    ZeRO 3 (and, offloaded, ZeRO 1 and 2) keeps a step's gradient and overwrites only what the next backward reaches: a
    parameter that is unused in the next step would move by the old gradient again. No communication.
    """
    origin = _ORIGINS.get(flat)
    if origin is None:
        return
    stage3 = stage3_of([parameter for _, parameter in origin.everyone()])
    if stage3 is None:
        if flat.grad is not None and flat.device.type == "cpu":  # the buffer of CPU offload; else dropped anyway
            flat.grad.zero_()
        return
    if getattr(stage3, "offload_optimizer", False) and flat.grad is not None:
        flat.grad.zero_()
    buffer = getattr(stage3, "grad_partitions_flat_buffer", None)
    # The sub-groups' gradients are views of one buffer: only the last one to be stepped may clear it.
    if buffer is not None and stage3.fp32_partitioned_groups_flat[-1] is flat:
        buffer.zero_()


def _pieces(flat: Tensor, group: Named, everyone: Named, name: str) -> list[Piece]:
    _refuse_unsupported(everyone)
    stage3 = stage3_of([parameter for _, parameter in everyone])
    try:
        if stage3 is not None:
            fragments, ranks = _of_sub_group(flat, stage3, everyone)
        elif any(is_partitioned(parameter) for _, parameter in group):
            fragments, ranks = _of_partition(flat, group)
        else:
            return [_whole_copy(flat, group)]
    except (AttributeError, KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        raise UnknownShardError(_unknown(flat, name, f"{type(error).__name__}: {error}")) from error
    split = Split(group=ranks) if dist.get_world_size(ranks) > 1 else None
    if split is not None:
        entries = [Entry(fragment.layer.name, (("shape", str(fragment.layer.shape)),)) for fragment in fragments]
        compare(entries, ranks, flat.device, IN_ONE_ORDER)
    pieces = [Piece(fragment.layer, fragment.segment, split) for fragment in fragments]
    _check(flat, fragments, pieces, name)
    return pieces


def _whole_copy(flat: Tensor, group: Named) -> Piece:
    matching = [name for name, parameter in group if parameter.shape == flat.shape]
    if len(group) != 1 or not matching:
        raise ValueError("neither a partition nor a copy of a parameter")
    return Piece(Layer(matching[0], tuple(flat.shape)))


def _of_partition(flat: Tensor, group: Named) -> tuple[list[Fragment], Any]:
    """Stages 1 and 2, and BF16_Optimizer: the parameters' places in the storage that they share."""
    members = [(name, parameter) for name, parameter in group if hasattr(parameter, "_dp_group")]
    ranks = members[0][1]._dp_group  # type: ignore[attr-defined]
    rank, size = dist.get_rank(ranks), flat.numel()
    storages = {parameter.untyped_storage().data_ptr() for _, parameter in members if parameter.numel()}
    if len(storages) > 1:
        raise ValueError(f"the parameters of a group lie in {len(storages)} buffers instead of one")
    fragments = []
    for name, parameter in members:
        elements = parameter.untyped_storage().nbytes() // parameter.element_size()
        if parameter.numel() and elements != size * dist.get_world_size(ranks):
            raise ValueError(
                f"{name} lies in a buffer of {elements} elements, not of {dist.get_world_size(ranks)} x {size}"
            )
        first = int(parameter.storage_offset()) - rank * size  # relative to this rank's partition
        start, stop = max(first, 0), min(first + parameter.numel(), size)
        segment = Segment(min(start, size), max(0, stop - start))
        weights = parameter.detach().reshape(-1).narrow(0, start - first if segment.length else 0, segment.length)
        fragments.append(Fragment(Layer(name, tuple(parameter.shape)), segment, weights))
    return fragments, ranks


def _of_sub_group(flat: Tensor, stage3: Any, everyone: Named) -> tuple[list[Fragment], Any]:
    """Stage 3: DeepSpeed's own table of offsets, without the padding."""
    index = next(i for i, candidate in enumerate(stage3.fp32_partitioned_groups_flat) if candidate is flat)
    names = {id(parameter): name for name, parameter in everyone}
    fragments = []
    members = stage3.fp16_groups[index]
    groups = {getattr(parameter, "ds_process_group", stage3.dp_process_group) for parameter in members}
    if len(groups) != 1:
        raise ValueError(f"the parameters of a sub-group are cut over {len(groups)} process groups")
    ranks = groups.pop()
    rank = dist.get_rank(ranks)
    for parameter in members:
        found, start, part = stage3.grad_position[stage3.get_param_id(parameter)]
        if found != index:
            raise ValueError(f"{names[id(parameter)]} is in sub-group {found}, not {index}")
        length = max(0, min(part, parameter.ds_numel - rank * part))
        stored = getattr(parameter, "ds_tensor", None)
        weights = None if stored is None or stored.numel() < length else stored.detach().reshape(-1)[:length]
        layer = Layer(names[id(parameter)], tuple(parameter.ds_shape))
        fragments.append(Fragment(layer, Segment(start, length), weights))
    return fragments, ranks


def _check(flat: Tensor, fragments: Sequence[Fragment], pieces: Sequence[Piece], name: str) -> None:
    """All ranks' segments must tile every layer once and agree with the model's weights. One all-reduce, host reads."""
    found = torch.zeros(3, len(fragments), dtype=torch.float64, device="cpu")
    for index, fragment in enumerate(fragments):
        inside = fragment.segment.start >= 0 and fragment.segment.start + fragment.segment.length <= flat.numel()
        found[0, index] = fragment.segment.length
        found[1, index] = float(not inside or not _agrees(fragment.segment(flat.detach()), fragment.weights))
    table = NormTable(pieces, ["l2"] * len(pieces), flat.device)
    lengths, disagreements, _ = (row.tolist() for row in table.complete(*found.to(flat.device)))
    for fragment, length, disagreement in zip(fragments, lengths, disagreements):
        numel = math.prod(fragment.layer.shape)
        if int(length) != numel:
            problem = f"the ranks hold {int(length)} elements of {fragment.layer.name}, which has {numel}"
            raise UnknownShardError(_unknown(flat, name, problem))
        if disagreement:
            raise UnknownShardError(
                f"{fragment.layer.name}: on {int(disagreement)} rank(s) DeepSpeed's full-precision copy is not the "
                "weight that the model holds. Weights that were changed after deepspeed.initialize() are overwritten "
                "by the next step: load them before, or call engine.optimizer.refresh_fp32_params() after changing "
                f"them. If you changed none, DeepSpeed {_version()} lays out partitions in a way this version of "
                "lightning_lamb does not know; please report it."
            )


def _agrees(master: Tensor, weights: Tensor | None) -> bool:
    if weights is None or master.numel() == 0:
        return True
    rounded = master.to(weights.dtype)
    weights = weights.to(master.device)
    return bool(((rounded == weights) | (rounded.isnan() & weights.isnan())).all())


def _refuse_unsupported(everyone: Named) -> None:
    for name, parameter in everyone:
        if getattr(parameter, "model_parallel", False) or getattr(parameter, "tensor_model_parallel", False):
            raise UnknownShardError(
                f"{name}: DeepSpeed cut it by tensor parallelism as well as by ZeRO, and norms over both have not been "
                'built. Remove "tensor_parallel" (autotp_size) from the DeepSpeed config, or use PyTorch\'s FSDP2 with '
                "tensor parallelism, where lightning_lamb is exact."
            )
        if getattr(parameter, "allreduce", True) is False or hasattr(parameter, "_autoep_expert"):
            raise UnknownShardError(
                f"{name}: an expert of a mixture-of-experts layer. Expert parallelism under DeepSpeed has not been "
                "tested with layer-wise norms: train with ep_size=1 and without DeepSpeed's MoE layers, or with Adam."
            )
        if getattr(parameter, "comm_dtype", None) == torch.float16:
            raise ConflictError(
                f'{name}: "torch_autocast" with float16 lets every rank decide by itself whether to skip a step, and a '
                'rank that skips leaves the others waiting for its norms. Use bfloat16, or DeepSpeed\'s "fp16".'
            )
    grid = getattr(sys.modules.get("deepspeed.utils.groups"), "mpu", None)
    stages = getattr(grid, "get_pipe_parallel_world_size", lambda: 1)()
    if stages > 1:
        raise UnknownShardError(
            f"DeepSpeed pipeline parallelism ({stages} stages): tied layers live on several stages, and their norms "
            "have not been tested. Use ZeRO without a PipelineModule."
        )


def _unknown(flat: Tensor, name: str, problem: str) -> str:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return (
        f"{name}: rank {rank} holds {flat.numel()} flat elements of DeepSpeed {_version()} in which layers were not "
        f"found ({problem}), so their norms would be wrong. Use a DeepSpeed version named in docs/deepspeed.md and the "
        "wrappers described there, or report this message."
    )


def _version() -> str:
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "(not imported)"))
