"""Partial norms of all layers, and the all-reduces that complete them.

A rank adds the partial statistics of the pieces it holds; one all-reduce per process group completes them. Everything
stays on the device: nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lamb.equations import NormKind, norm_of_statistic, statistic_dtype
from lightning_lamb.errors import RankDisagreementError
from lightning_lamb.sharding.agreement import REMEDY, in_one_order
from lightning_lamb.sharding.layout import Piece, Split


class Reduction:
    """One process group, and the entries of the table that its ranks complete together.

    Args:
        groups: the process group; several, one after the other, only where a mesh without names cannot be flattened.
        entries: indices into the table, the same on every rank of the group.
        counted: 1.0 where this rank's part counts, 0.0 where it is a copy of what another rank of the group counts.
        device: where the table lives.
    """

    def __init__(
        self, groups: Sequence[Any], entries: Sequence[int], counted: Sequence[float], device: torch.device
    ) -> None:
        self.groups = list(groups)
        self.indices = list(entries)  # the host's copy: reading the tensor would wait for the device
        self.entries = torch.tensor(entries, device=device)
        self.counted = None
        if not all(counted):
            self.counted = torch.tensor(counted, device=device, dtype=statistic_dtype(device))
        # Two numbers travel with every vector: how many ranks' layers have changed, and how many ranks' have not.
        dtype = statistic_dtype(device)
        self._changed = torch.tensor([1.0, 0.0], device=device, dtype=dtype)
        self._unchanged = torch.tensor([0.0, 1.0], device=device, dtype=dtype)
        # NCCL cannot reduce what CPU offload keeps on the host, so the vector (a few kB) travels there and back.
        self.wire = torch.device("cuda") if device.type == "cpu" and any(map(_is_cuda_only, groups)) else device

    def all_reduce(self, rows: Tensor, operation: Any) -> None:
        """Completes ``rows[:, entries]`` over the group, in place. One collective.

        Args:
            rows: (k, layers) partial statistics.
            operation: SUM or MAX.
        """
        packed = rows[:, self.entries]
        if self.counted is not None:
            packed = packed * self.counted
        rows[:, self.entries] = self._reduced(packed, operation)

    def total(self, statistics: Tensor) -> Tensor:
        """The sum of ``statistics[entries]`` over entries and ranks. One collective.

        Args:
            statistics: (layers,) partial sums.

        Returns:
            0-dim tensor.
        """
        own = statistics[self.entries]
        if self.counted is not None:
            own = own * self.counted
        return self._reduced(own.sum().reshape(1), dist.ReduceOp.SUM)[0]

    def announce(self, numbers: int, operation: Any) -> bool:
        """Tells the other ranks, in place of what they expect, that this rank's layers have changed. One collective.

        Args:
            numbers: the length of the vector that they reduce.
            operation: with which they do.

        Returns:
            Whether the layers of all ranks have changed.
        """
        nothing = torch.zeros(numbers, device=self._changed.device, dtype=self._changed.dtype)
        sent = self._sent(torch.cat([nothing, self._changed]), operation)
        return not float(sent[-1])

    def _reduced(self, packed: Tensor, operation: Any) -> Tensor:
        sent = self._sent(torch.cat([packed.reshape(-1), self._unchanged]), operation)
        if sent.device.type == "cpu" and float(sent[-2]):  # elsewhere reading it would wait for the device
            raise RankDisagreementError(
                f"Since the last step other ranks' layers have changed (frozen, unfrozen, added or given other "
                f"options), and those of rank {dist.get_rank()} have not; the other ranks name the layer. {REMEDY}"
            )
        return sent[:-2].view(packed.shape)

    def _sent(self, vector: Tensor, operation: Any) -> Tensor:
        sent = vector.to(self.wire)
        for group in self.groups:
            dist.all_reduce(sent, op=operation, group=group)
        return sent.to(vector.device)


class NormTable:
    """Where every layer's statistics are collected and completed.

    Args:
        pieces: every piece on this device that takes part, in the same order on every rank.
        norms: the norm of each piece's layer.
        device: of the pieces.
    """

    def __init__(self, pieces: Sequence[Piece], norms: Sequence[NormKind], device: torch.device) -> None:
        self.device = device
        self.size = len(pieces)
        self.split = [piece.split is not None for piece in pieces]
        self.reductions = reductions(pieces, device)
        self.kinds: list[NormKind] = list(norms)
        self._maximum = [norm == "linf" for norm in norms]

    def complete(self, weights: Tensor, updates: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (``linf``: maximises) every layer's statistics over the ranks that share it.

        One all-reduce per process group; two where a group mixes ``linf`` with other norms.

        Args:
            weights: (layers,) partial statistics of the weights.
            updates: (layers,) partial statistics of the updates.
            active: (layers,) 1 where this rank has a gradient for the layer, 0 where it has none.

        Returns:
            The three, completed.
        """
        rows = torch.stack([weights, updates, active])
        for reduction in self.reductions:
            kinds = self._kinds(reduction)
            if kinds == {False}:
                reduction.all_reduce(rows, dist.ReduceOp.SUM)
            elif kinds == {True}:
                reduction.all_reduce(rows, dist.ReduceOp.MAX)
            else:
                summed, maximal = rows.clone(), rows.clone()
                reduction.all_reduce(summed, dist.ReduceOp.SUM)
                reduction.all_reduce(maximal, dist.ReduceOp.MAX)
                choose = torch.tensor(self._maximum, device=rows.device)
                rows = torch.where(choose, maximal, summed)
        return rows[0], rows[1], rows[2]

    def announce(self) -> bool:
        """See `Reduction.announce`: for every rank that completes this table now."""
        found = True
        for reduction in self.reductions:
            operation = dist.ReduceOp.MAX if self._kinds(reduction) == {True} else dist.ReduceOp.SUM
            found = found and reduction.announce(3 * len(reduction.indices), operation)
        return found

    def _kinds(self, reduction: Reduction) -> set[bool]:
        return {self._maximum[entry] for entry in reduction.indices} if any(self._maximum) else {False}

    def norms(self, statistics: Tensor) -> Tensor:
        """(layers,) completed statistics to (layers,) norms."""
        if len(set(self.kinds)) == 1:
            return norm_of_statistic(statistics, self.kinds[0])
        return torch.stack([norm_of_statistic(value, kind) for value, kind in zip(statistics.unbind(), self.kinds)])


class GlobalNorm:
    """The norm over all layers and all ranks, each element counted once.

    Args:
        pieces: every piece on this device, with or without a gradient, in the same order on every rank.
        device: of the pieces.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        whole = [index for index, piece in enumerate(pieces) if piece.split is None]
        self.whole = torch.tensor(whole, device=device, dtype=torch.long)
        self.reductions = reductions(_in_largest_mesh(pieces), device)

    def total(self, statistics: Tensor) -> Tensor:
        """Sums square norms over all layers. One all-reduce of one number per process group.

        Layers cut along some axes of a mesh travel with those cut along all of it: they are copied along the rest.

        Args:
            statistics: (pieces,) this rank's sums of squares.

        Returns:
            0-dim tensor, the same on every rank that shares these layers.
        """
        total = statistics[self.whole].sum()
        for reduction in self.reductions:
            total = total + reduction.total(statistics)
        return total

    def announce(self) -> bool:
        """See `Reduction.announce`: for every rank that completes this norm now."""
        return all(reduction.announce(1, dist.ReduceOp.SUM) for reduction in self.reductions)


def reductions(pieces: Sequence[Piece], device: torch.device) -> list[Reduction]:
    """The all-reduces that complete ``pieces``: one per process group, one per device mesh."""
    by_group: dict[Any, list[int]] = {}
    by_mesh: dict[Any, list[int]] = {}
    for index, piece in enumerate(pieces):
        if piece.split is None:
            continue
        if piece.split.mesh is not None:
            by_mesh.setdefault(piece.split.mesh, []).append(index)
        else:
            by_group.setdefault(piece.split.group, []).append(index)
    found = [Reduction([group], entries, [1.0] * len(entries), device) for group, entries in by_group.items()]
    for mesh, entries in by_mesh.items():
        splits = [pieces[index].split for index in entries]
        found.append(_mesh_reduction(mesh, [split for split in splits if split], entries, device))
    order = {group: place for place, group in enumerate(in_one_order(reduction.groups[0] for reduction in found))}
    return sorted(found, key=lambda reduction: order[reduction.groups[0]])


def _mesh_reduction(mesh: Any, splits: list[Split], entries: list[int], device: torch.device) -> Reduction:
    axes = sorted({axis for split in splits for axis in split.axes})
    coordinate = mesh.get_coordinate()
    # A layer that is copied along one of the reduced axes counts at coordinate 0 of it only.
    counted = [float(all(axis in split.axes or coordinate[axis] == 0 for axis in axes)) for split in splits]
    return Reduction(_axes_groups(mesh, axes), entries, counted, device)


def _axes_groups(mesh: Any, axes: list[int]) -> list[Any]:
    """The ranks that differ from this one along ``axes`` only. Creates the group at the first call (collective)."""
    names = mesh.mesh_dim_names
    if len(axes) == 1 or not names:  # a mesh without names does not flatten: one axis after the other
        return [mesh.get_group(axis) for axis in axes]
    part = mesh if len(axes) == mesh.ndim else mesh[tuple(names[axis] for axis in axes)]
    return [part._flatten().get_group()]


def _in_largest_mesh(pieces: Sequence[Piece]) -> list[Piece]:
    """Says of pieces cut along a sub-mesh of another piece's mesh where they are in that one.

    FSDP2 over tensor parallelism leaves layers without a tensor-parallel plan on the data-parallel mesh alone.
    """
    meshes = list(dict.fromkeys(piece.split.mesh for piece in pieces if piece.split and piece.split.mesh is not None))
    largest: Any = max(meshes, key=lambda mesh: mesh.ndim, default=None)
    moved = []
    for piece in pieces:
        split = piece.split
        if split is not None and split.mesh is not None and _is_part_of(split.mesh, largest):
            names, all_names = split.mesh.mesh_dim_names or (), largest.mesh_dim_names
            axes = tuple(all_names.index(names[axis]) for axis in split.axes)
            piece = replace(piece, split=Split(mesh=largest, axes=axes))
        moved.append(piece)
    return moved


def _is_part_of(mesh: Any, whole: Any) -> bool:
    names = mesh.mesh_dim_names
    if not names or mesh.ndim >= whole.ndim or not set(names) <= set(whole.mesh_dim_names or ()):
        return False
    return bool(whole[names if len(names) > 1 else names[0]] == mesh)


def _is_cuda_only(group: Any) -> bool:
    return dist.get_backend(group) == "nccl"


def gather_by_name(values: dict[str, Tensor], group: Any | None = None) -> dict[str, float]:
    """Merges per-layer values that different ranks hold (ZeRO-1) into one dictionary. One collective, reads the host.

    Args:
        values: name to 0-dim tensor, this rank's layers.
        group: the ranks to ask; None is the default group.
    """
    own = {name: float(value) for name, value in values.items()}
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return own
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group=group)
    merged: dict[str, float] = {}
    for part in everyone:
        merged.update(part)
    return merged
