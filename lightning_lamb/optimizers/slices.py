"""Even slices of whole tensors, one per rank, and how they become whole again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lamb.errors import ConflictError, UnknownShardError
from lightning_lamb.kernels.statistics import flattened
from lightning_lamb.sharding.annotate import annotate_slice


class Slice:
    """This rank's elements of one parameter, in the order in which they lie in memory.

    Args:
        parameter: whole.
        name: of the layer.
        rank: this rank in the group.
        ranks: size of the group.
        group: who holds the other slices.
        is_named: whether ``name`` is the layer's, and not that of its place in the groups.

    Attributes:
        piece: a parameter of this rank's elements, sharing memory with ``parameter``.
        width: elements of the widest slice, ``ceil(elements / ranks)``; the last ranks may have fewer, or none.
    """

    def __init__(
        self, parameter: Tensor, name: str, rank: int, ranks: int, group: Any | None, is_named: bool = True
    ) -> None:
        self.parameter, self.name, self.rank, self.ranks, self.is_named = parameter, name, rank, ranks, is_named
        self._shape = parameter.shape
        self.elements = parameter.numel()
        self.width = -(-self.elements // ranks)
        self.start = min(rank * self.width, self.elements)
        self.stop = min(self.start + self.width, self.elements)
        if flattened(parameter.detach()) is None:
            raise UnknownShardError(
                f"{name}: its elements overlap or have gaps in memory (strides {parameter.stride()}), so it cannot be "
                "cut into slices. Make it a dense parameter (`.contiguous()`)."
            )
        self.piece = nn.Parameter(self.cut(parameter.detach()), requires_grad=parameter.requires_grad)
        annotate_slice(self.piece, name, tuple(parameter.shape), group if ranks > 1 else None, cut=ranks > 1)

    def fits(self, parameter: Tensor, place: tuple[int, int]) -> bool:
        """Whether this is still the slice of ``parameter``, in its present shape, for (rank, ranks) ``place``."""
        return self.parameter is parameter and self._shape == parameter.shape and place == (self.rank, self.ranks)

    def recut(self, before: Slice, state: Mapping[str, Any]) -> dict[str, Any]:
        """This slice's state, from that of the slice of the same parameter before there was a process group.

        Raises:
            ConflictError: the parameter has another shape by now, or the other ranks' state would be needed.
        """
        if before._shape != self._shape or before.ranks != 1:
            raise ConflictError(
                f"{self.name}: its state was made for shape {tuple(before._shape)} on {before.ranks} ranks; now it has "
                f"shape {tuple(self._shape)} on {self.ranks}, and state cannot follow. Build the optimizer anew."
            )
        own = slice(self.start, self.stop)
        return {
            key: value[own].clone() if isinstance(value, Tensor) and value.shape == before.piece.shape else value
            for key, value in state.items()
        }

    def checksum(self) -> int:
        """The sum of the bit patterns of the whole layer. Reads the host."""
        flat = self.flat(self.parameter.detach())
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        return int(flat.view(bits).sum(dtype=torch.int64))

    def flat(self, tensor: Tensor) -> Tensor:
        """All elements of a tensor laid out like the parameter, in the parameter's memory order; a view if possible."""
        if tensor.stride() != self.parameter.stride():
            tensor = torch.empty_like(self.parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        found = flattened(tensor)
        assert found is not None, "dense like the parameter"
        return found

    def cut(self, tensor: Tensor) -> Tensor:
        """This rank's elements of a tensor laid out like the parameter."""
        return self.flat(tensor)[self.start : self.stop]

    def cut_copy(self, value: Any) -> Any:
        """A copy of this rank's elements, which does not keep the rest in memory; what is no such tensor, as it is."""
        laid_out = isinstance(value, Tensor) and value.shape == self.parameter.shape
        return self.cut(value).clone() if laid_out else value

    def follow(self, grad: Tensor | None) -> None:
        """Points the piece at the parameter's present memory, and gives it its part of the gradient."""
        self.piece.data = self.cut(self.parameter.detach())
        self.piece.requires_grad_(self.parameter.requires_grad)
        self.piece.grad = None if grad is None else self.cut(grad)


def in_one_order(slices: Sequence[Slice]) -> list[Slice]:
    """The slices in an order that is the same on every rank: by name."""
    return sorted(slices, key=lambda own: own.name)


def in_buckets(slices: Sequence[Slice], limit: int) -> Iterator[list[Slice]]:
    """Yields slices of one dtype and device whose parameters have ``limit`` bytes together, or one larger."""
    alike: dict[Any, list[Slice]] = {}
    for own in slices:
        alike.setdefault((own.parameter.dtype, own.parameter.device), []).append(own)
    for members in alike.values():
        bucket: list[Slice] = []
        size = 0
        for own in members:
            here = own.elements * own.parameter.element_size()
            if bucket and size + here > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(own)
            size += here
        yield bucket


def gather_slices(bucket: Sequence[Slice], group: Any | None) -> None:
    """Writes every rank's new elements into the parameters. One all-gather."""
    sent = _packed([own.piece.data for own in bucket], [own.width for own in bucket])
    ranks = bucket[0].ranks
    received = sent.new_empty(ranks * len(sent))
    # As bytes: not every backend knows every floating type.
    dist.all_gather_into_tensor(received.view(torch.uint8), sent.view(torch.uint8), group=group)
    for own, flat in zip(bucket, _unpacked(received.view(ranks, -1), bucket)):
        own.flat(own.parameter.detach()).copy_(flat)


def gather_state(
    slices: Sequence[Slice],
    state: Mapping[Any, Mapping[str, Any]],
    limit: int,
    to: int,
    group: Any | None,
    ranks: int,
) -> dict[int, dict[str, Any]] | None:
    """The state of whole parameters by their number, in host memory of rank ``to``; None elsewhere.

    Communication: one gather of objects, one gather per kind of state and bucket.
    """
    described = _describe(slices, state, group, ranks)
    here = ranks == 1 or dist.get_rank(group) == to
    found: dict[int, dict[str, Any]] = {
        index: {key: value for key, (kind, value) in entries.items() if kind == "value"}
        for index, entries in described.items()
    }
    number = {id(own): index for index, own in enumerate(slices)}
    kinds = dict.fromkeys(
        (key, kind) for entries in described.values() for key, (kind, _) in entries.items() if kind != "value"
    )
    for key, dtype in kinds:
        members = [own for own in slices if described.get(number[id(own)], {}).get(key, ("",))[0] == dtype]
        for bucket in in_buckets(members, limit):
            rows = _gathered([state.get(own.piece, {}).get(key) for own in bucket], bucket, dtype, to, group)
            if rows is None:
                continue
            for own, flat in zip(bucket, _unpacked(rows, bucket)):
                whole = torch.empty_like(own.parameter, dtype=dtype, device="cpu", requires_grad=False)
                own.flat(whole).copy_(flat)
                found[number[id(own)]][key] = whole
    # In the order that the optimizer itself has them in.
    ordered = {index: {key: found[index][key] for key in described[index] if key in found[index]} for index in found}
    return ordered if here else None


def _describe(
    slices: Sequence[Slice], state: Mapping[Any, Mapping[str, Any]], group: Any | None, ranks: int
) -> dict[int, dict[str, tuple[Any, Any]]]:
    """Per parameter and key ("value", it) or (dtype, None) for what is sliced; of all ranks together."""
    own = {}
    for index, part in enumerate(slices):
        entries = {}
        for key, value in state.get(part.piece, {}).items():
            sliced = isinstance(value, Tensor) and key != "step" and value.shape == part.piece.shape
            entries[key] = (value.dtype, None) if sliced else ("value", _on_host(value))
        if entries:
            own[index] = entries
    if ranks == 1:
        return own
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, own, group=group)
    merged: dict[int, dict[str, tuple[Any, Any]]] = {}
    for part in everyone:
        for index, entries in part.items():
            merged.setdefault(index, {}).update(entries)
    return dict(sorted(merged.items()))


def _gathered(
    parts: Sequence[Tensor | None], bucket: Sequence[Slice], dtype: torch.dtype, to: int, group: Any | None
) -> Tensor | None:
    """(ranks, width) what every rank holds of a bucket's state; None on other ranks than ``to``."""
    device = bucket[0].parameter.device
    filled = [
        torch.zeros(len(own.piece), dtype=dtype, device=device) if p is None else p for p, own in zip(parts, bucket)
    ]
    sent = _packed(filled, [own.width for own in bucket])
    ranks = bucket[0].ranks
    if ranks == 1:
        return sent.view(1, -1)
    here = dist.get_rank(group) == to
    received = [torch.empty_like(sent).view(torch.uint8) for _ in range(ranks)] if here else None
    dist.gather(sent.view(torch.uint8), received, group=group, group_dst=to)
    return None if received is None else torch.stack([part.view(dtype) for part in received])


def _packed(parts: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """One vector of all parts, each filled up to its width."""
    packed = parts[0].new_zeros(sum(widths))
    for part, room in zip(parts, packed.split(list(widths))):
        room[: len(part)].copy_(part)
    return packed


def _unpacked(rows: Tensor, bucket: Sequence[Slice]) -> Iterator[Tensor]:
    """The flat elements of each parameter of a bucket, from (ranks, width) packed slices."""
    for own, columns in zip(bucket, rows.split([own.width for own in bucket], dim=1)):
        yield columns.reshape(-1)[: own.elements]


def _on_host(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
