"""The step of layers that are cut over ranks: all local directions, the all-reduce, all applications."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.kernels import Batch, Kernel
from lightning_lamb.optimizers.batches import crews_of
from lightning_lamb.optimizers.plan import LayerPlan, Slot
from lightning_lamb.optimizers.roster import Roster
from lightning_lamb.sharding import NormTable

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer


@dataclass
class Pending:
    """A batch between its two passes.

    Attributes:
        absent: this rank has no gradient for the batch's one slot; it moves only if another rank has one.
        active: for an absent slot, the number of ranks that have one; a 0-dim tensor.
    """

    kernel: Kernel
    batch: Batch
    slots: list[Slot]
    weights: Tensor
    updates: Tensor
    absent: bool = False
    active: Tensor | None = None


@dataclass
class Elsewhere:
    """Adapted layers of which this rank holds no element: for the report only.

    Attributes:
        slots: of one parameter group.
        weights: (slots,) completed statistics.
        updates: (slots,) completed statistics.
    """

    slots: list[Slot]
    weights: Tensor
    updates: Tensor


@dataclass
class SplitStep:
    """What is left to do after the all-reduce."""

    moving: list[Pending] = field(default_factory=list)
    elsewhere: list[Elsewhere] = field(default_factory=list)


def split_step(
    optimizer: LayerwiseOptimizer,
    plan: LayerPlan,
    roster: Roster,
    grad_scale: Tensor | None,
) -> SplitStep:
    """Runs the first pass and completes the norms.

    A layer that has a gradient on some ranks only is stepped on all of them, with zero for the missing ones: its pieces
    are one layer. A rank that lacks gradients which it could have (elements, not frozen) reads from the device, once,
    which of those layers have one elsewhere; otherwise the host reads nothing.

    Communication: one all-reduce per process group.

    Returns:
        The batches to apply, their statistics completed over all ranks.
    """
    pending = []
    for crew in roster.split:
        batch = crew.batch(optimizer, roster.coefficients(crew), grad_scale)
        pending.append(Pending(crew.kernel, batch, crew.slots, *crew.kernel.direction(batch)))
    result = SplitStep()
    for device, (members, table) in plan.tables.items():
        if members:
            missing = [slot for slot in members if slot.parameter.grad is None and slot.parameter.requires_grad]
            pending += [_absent(optimizer, slot) for slot in missing if slot.elements]
            here = [item for item in pending if item.slots[0].device == device]
            empty = [slot for slot in missing if not slot.elements and slot.adapt]
            result.elsewhere += _complete(plan, members, table, here, empty)
    result.moving = [item for item in pending if not item.absent] + _moved_elsewhere(optimizer, pending)
    return result


def _complete(
    plan: LayerPlan, members: Sequence[Slot], table: NormTable, pending: list[Pending], empty: list[Slot]
) -> list[Elsewhere]:
    device = members[0].device
    rows = torch.zeros(3, len(members), dtype=equations.statistic_dtype(device), device=device)
    for item in pending:
        entries = plan.entries(item.slots, members)
        rows[0].index_copy_(0, entries, item.weights)
        rows[1].index_copy_(0, entries, item.updates)
        if not item.absent:
            rows[2].index_fill_(0, entries, 1.0)
    weights, updates, active = table.complete(rows[0], rows[1], rows[2])
    for item in pending:
        entries = plan.entries(item.slots, members)
        item.weights, item.updates = weights[entries], updates[entries]
        if item.absent:
            item.active = active[entries][0]
    found = []
    for group in dict.fromkeys(slot.group for slot in empty):
        slots = [slot for slot in empty if slot.group == group]
        entries = plan.entries(slots, members)
        found.append(Elsewhere(slots, weights[entries], updates[entries]))
    return found


def _absent(optimizer: LayerwiseOptimizer, slot: Slot) -> Pending:
    """What a zero gradient would do to the slot, worked out on copies of its moments."""
    optimizer.state_of(slot)
    (crew,) = crews_of([slot], optimizer, {id(slot): 0}, whole=False)
    batch = crew.batch(optimizer, [optimizer.next_coefficients(slot)], None)
    batch.grads = [torch.zeros_like(weight) for weight in batch.weights]
    batch.moments1 = [moment.clone() for moment in batch.moments1]
    batch.moments2 = [moment.clone() for moment in batch.moments2]
    return Pending(crew.kernel, batch, [slot], *crew.kernel.direction(batch), absent=True)


def _moved_elsewhere(optimizer: LayerwiseOptimizer, pending: Sequence[Pending]) -> list[Pending]:
    """Reads which absent layers have a gradient on another rank, and keeps the tentative moments of those."""
    absent = [(item, item.active) for item in pending if item.absent and item.active is not None]
    if not absent:
        return []
    flags = torch.stack([active for _, active in absent]).tolist()  # the one host synchronisation
    moving = [item for (item, _), flag in zip(absent, flags) if flag > 0]
    for item in moving:
        slot = item.slots[0]
        optimizer.count_step(slot.parameter)
        for key, value in zip(optimizer.moment_keys(), [*item.batch.moments1, *item.batch.moments2]):
            slot.piece.view(optimizer.state[slot.parameter][key]).copy_(value)
    return moving
