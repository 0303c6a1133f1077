"""All ranks must mean the same layers: compared before norms are added up, because a sum does not tell of what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_lamb.errors import RankDisagreementError
from lightning_lamb.sharding.dtensor import is_dtensor
from lightning_lamb.sharding.layout import Piece

REMEDY = (
    "Give the optimizer the same layers with the same options on every rank, and freeze, unfreeze and add layers on "
    "all ranks at the same step. Their order may differ where they have names (`named_parameters()` or "
    "`lightning_lamb.sharding.annotate(model)`); where they have none, build groups from lists, not from sets, whose "
    "order is another in every process."
)


@dataclass(frozen=True)
class Entry:
    """What all ranks that share a layer must say of it.

    Attributes:
        name: of the layer.
        facts: (what, value) pairs, for example ("shape", "(16, 16)").
    """

    name: str
    facts: tuple[tuple[str, str], ...]


def process_groups(parameter: Any, piece: Piece, cut_only: bool = False) -> list[Any]:
    """The process groups whose ranks share a layer.

    Args:
        parameter: of the optimizer.
        piece: of the layer.
        cut_only: leave out the mesh axes along which every rank has a copy.
    """
    if piece.split is not None and piece.split.mesh is None:
        return [piece.split.group]
    if not is_dtensor(parameter):
        return []
    mesh = parameter.device_mesh
    axes: Iterable[int] = range(mesh.ndim)
    if cut_only:
        axes = piece.split.axes if piece.split is not None else ()
    return [mesh.get_group(axis) for axis in axes if mesh.size(axis) > 1]


def in_one_order(groups: Iterable[Any]) -> list[Any]:
    """The process groups, each once, in an order in which no rank can wait for another in a circle."""
    return sorted(set(groups), key=lambda group: (ranks_of(group), str(group.group_name)))


def ranks_of(group: Any) -> tuple[int, ...]:
    """The global ranks of a process group."""
    return tuple(dist.get_process_group_ranks(group))


def compare(entries: Sequence[Entry], group: Any, device: torch.device, remedy: str = REMEDY) -> None:
    """Compares what the ranks of a group say of their layers.

    Communication: one all-reduce of two numbers, which the host reads; on a difference also one gather of objects.

    Args:
        entries: of the layers that these ranks share, in the order in which their norms will travel.
        group: the process group.
        device: of the layers.
        remedy: what the message says to do.

    Raises:
        RankDisagreementError: on all ranks of the group, if they differ.
    """
    digest = int.from_bytes(hashlib.sha256(repr(entries).encode()).digest()[:7], "big")
    wire = torch.device("cuda") if dist.get_backend(group) == "nccl" and device.type == "cpu" else device
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=wire)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    largest, negated = ends.tolist()
    if largest == -negated:
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, list(entries), group=group)
    raise RankDisagreementError(f"{_message(everyone, ranks_of(group))} {remedy}")


def first_difference(one: Sequence[Entry], other: Sequence[Entry]) -> tuple[str, str, str]:
    """(name of the first layer that differs, what ``one`` says of it, what ``other`` says of it)."""
    ours, theirs = {entry.name: entry for entry in one}, {entry.name: entry for entry in other}
    for first, second in zip(one, other):
        if first == second:
            continue
        if first.name == second.name:
            differing = [(a, b) for a, b in zip(first.facts, second.facts) if a != b]
            return first.name, _told(a for a, _ in differing), _told(b for _, b in differing)
        if second.name not in ours and first.name not in theirs:
            return first.name, "it is there", f"it is not there, but {second.name} is"
        if second.name not in ours:
            return second.name, "it is not there", _told(second.facts)
        if first.name not in theirs:
            return first.name, _told(first.facts), "it is not there"
        return first.name, "it is at this place", f"{second.name} is"
    longer, here = (one, True) if len(one) > len(other) else (other, False)
    extra = longer[min(len(one), len(other))]
    told = _told(extra.facts), "it is not there"
    return (extra.name, *told) if here else (extra.name, *reversed(told))  # type: ignore[return-value]


def _message(everyone: Sequence[Sequence[Entry]], ranks: Sequence[int]) -> str:
    own = next(index for index, rank in enumerate(ranks) if rank == dist.get_rank())
    other = next(index for index, entries in enumerate(everyone) if entries != everyone[own])
    name, here, there = first_difference(everyone[own], everyone[other])
    return (
        f"{name}: ranks disagree about the layers that they share. On rank {ranks[own]} (of {len(everyone[own])} "
        f"layers) {here}; on rank {ranks[other]} (of {len(everyone[other])}) {there}. Norms of different layers would "
        "be added up."
    )


def _told(facts: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{what} {value}" for what, value in facts)
