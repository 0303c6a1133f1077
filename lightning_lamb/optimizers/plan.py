"""Which layers an optimizer has, where their pieces are, and which of them have a trust ratio: worked out once."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.kernels.unchanged import Unchanged
from lightning_lamb.sharding import (
    GlobalNorm,
    NormTable,
    Piece,
    annotate_fully_sharded,
    annotation,
    clean_name,
    is_dtensor,
    locate,
)
from lightning_lamb.uncompiled import uncompiled

KEPT_ENTRIES = 1 << 8
"""Tensors of positions per plan: a table for each crew in every kept pattern of missing gradients, and more."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One piece of one layer, as the optimizer meets it.

    Attributes:
        group: the parameter group's index.
        parameter: the optimizer's parameter that contains the piece.
        piece: which layer, which elements.
        exempt: whether the layer is spared weight decay and trust ratio, because it has one dimension.
        adapt: whether the layer has a trust ratio.
        device: of the elements.
        norm: of the group.
        elements: how many are here.
        completed: shared by all slots of a plan: id of the parameter to local gradient, for the duration of a step and
            for gradients that had to be added up first (see `gradients.completed`).
    """

    group: int
    parameter: Tensor
    piece: Piece
    exempt: bool
    adapt: bool
    device: torch.device
    norm: Any
    elements: int
    completed: dict[int, Tensor]


class LayerPlan:
    """All slots of an optimizer, and the tables that complete their norms.

    What travels between ranks is in the order of the layers' names, so that it does not depend on the order of the
    parameters, which may be another on another rank.

    Args:
        groups: the optimizer's parameter groups.

    Attributes:
        slots: in the order of the groups.
        shared: those that concern other ranks: pieces of layers, and DTensors, whose gradients may be partial sums.
        split: of the shared ones, the pieces of layers.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        annotate_fully_sharded([parameter for group in groups for parameter in group["params"]])
        self.slots: list[Slot] = []
        self.completed: dict[int, Tensor] = {}
        self.rosters: dict[Any, Any] = {}  # these three: see roster.py
        self.stamp: Any = None
        self.kept_states: list[Any] = []
        for index, group in enumerate(groups):
            for position, parameter in enumerate(group["params"]):
                for piece in locate(parameter, parameter_name(group, index, position)):
                    self.slots.append(_slot(index, group, parameter, piece, self.completed))
        self.by_parameter: dict[int, list[Slot]] = {}
        for slot in self.slots:
            self.by_parameter.setdefault(id(slot.parameter), []).append(slot)
        self._ordered = sorted(self.slots, key=lambda slot: slot.piece.layer.name)
        self.dtensors = [slot.parameter for slot in self._ordered if is_dtensor(slot.parameter)]
        # Exempt layers join the table of a group that communicates anyway: their activity flag keeps ranks together.
        self.split = [slot for slot in self._ordered if slot.piece.split is not None]
        self.shared = [slot for slot in self._ordered if slot.piece.split is not None or is_dtensor(slot.parameter)]
        self.devices = list(dict.fromkeys(slot.device for slot in self._ordered))
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self._places = _places(self.parameters)
        self._unchanged = Unchanged(self.parameters)
        self._entries: dict[Any, Tensor] = {}
        self._global_norms: dict[torch.device, tuple[list[Slot], GlobalNorm]] = {}

    @functools.cached_property
    def tables(self) -> dict[torch.device, tuple[list[Slot], NormTable]]:
        """Per device, the slots and the table that completes their norms. Making it may create process groups."""
        return {device: self._table(device) for device in self.devices}

    def _table(self, device: torch.device) -> tuple[list[Slot], NormTable]:
        slots = [slot for slot in self.split if slot.device == device]
        if not any(slot.adapt for slot in slots):
            slots = []
        return slots, NormTable([slot.piece for slot in slots], [slot.norm for slot in slots], device)

    @uncompiled
    def holds(self) -> bool:
        """Whether parameters still are where they were, in the same shapes; ``module.to(device)`` keeps the objects."""
        if self._unchanged.holds(self.parameters):
            return True
        if _places(self.parameters) != self._places:
            return False
        self._unchanged = Unchanged(self.parameters)  # another dtype, or frozen: `roster.py` looks at those
        return True

    def entries(self, slots: Sequence[Slot], members: Sequence[Slot]) -> Tensor:
        """(slots,) positions of ``slots`` in the table of ``members``, on their device; copied there once."""
        key = tuple(map(id, slots))
        if key not in self._entries:
            if len(self._entries) >= KEPT_ENTRIES:  # layers that are dropped at random
                self._entries.clear()
            position = {id(member): index for index, member in enumerate(members)}
            self._entries[key] = torch.tensor([position[id(slot)] for slot in slots], device=slots[0].device)
        return self._entries[key]

    def global_norms(self) -> dict[torch.device, tuple[list[Slot], GlobalNorm]]:
        """Per device, the slots and the reduction that together give the gradient's norm."""
        if not self._global_norms:
            for device in self.devices:
                slots = [slot for slot in self._ordered if slot.device == device]
                self._global_norms[device] = slots, GlobalNorm([slot.piece for slot in slots], device)
        return self._global_norms


def _places(parameters: Sequence[Tensor]) -> list[tuple[torch.device, torch.Size]]:
    return [(parameter.device, parameter.shape) for parameter in parameters]


def fingerprint(groups: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Changes when a plan made from ``groups`` no longer fits: other parameters, other exemptions, other names."""
    return tuple(
        (
            tuple(map(id, group["params"])),
            # How much it decays is asked at every step: schedules change it.
            group["adapt"] if group["adapt"] != "decayed" else group["weight_decay"] != 0,
            group["exempt_1d"],
            group["norm"],
            len(group.get("param_names", ())),
        )
        for group in groups
    )


def parameter_name(group: Mapping[str, Any], group_index: int, position: int) -> str:
    """The name in the group, else the annotated one, else "group{i}.param{j}"."""
    names = group.get("param_names")
    if names is not None and len(names) == len(group["params"]):
        return clean_name(names[position])
    known = annotation(group["params"][position])
    return known.name if known is not None else f"group{group_index}.param{position}"


def _slot(index: int, group: Mapping[str, Any], parameter: Tensor, piece: Piece, completed: dict[int, Tensor]) -> Slot:
    exempt = bool(group["exempt_1d"]) and len(piece.layer.shape) <= 1
    adapt = group["adapt"] if group["adapt"] != "decayed" else group["weight_decay"] != 0
    if piece.split is not None and group["differentiable"]:
        raise InvalidOptionError(
            f"differentiable=True: {piece.layer.name} is sharded, and gradients do not flow through the all-reduce of "
            "its norms. Use whole parameters."
        )
    local = piece.view(parameter.detach())
    adapts = bool(adapt) and not exempt
    return Slot(index, parameter, piece, exempt, adapts, local.device, group["norm"], local.numel(), completed)
