"""The layers that a step moves, sorted into crews and counted: kept from step to step for as long as it holds."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lamb.equations import Coefficients, Scalar, statistic_dtype
from lightning_lamb.kernels import cpu
from lightning_lamb.optimizers.batches import Crew, crews_of
from lightning_lamb.optimizers.plan import LayerPlan, Slot
from lightning_lamb.uncompiled import uncompiled

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

_dtype_of = attrgetter("dtype")

KEPT = 8
"""Rosters per plan; a model whose set of gradients alternates between more patterns sorts them anew."""


class Roster:
    """The slots that have a gradient, in crews.

    Attributes:
        whole: crews of layers of which no other rank has a piece.
        split: crews of pieces.

    Args:
        slots: with a gradient each.
        optimizer: whose they are; their parameters have state.
        plan: of the optimizer.
    """

    def __init__(self, slots: Sequence[Slot], optimizer: LayerwiseOptimizer, plan: LayerPlan) -> None:
        positions = {id(slot): position for position, slot in enumerate(plan.slots)}
        whole = [slot for slot in slots if slot.piece.split is None]
        self.whole = crews_of(whole, optimizer, positions, whole=True)
        self.split = crews_of(
            [slot for slot in slots if slot.piece.split is not None], optimizer, positions, whole=False
        )
        self._members = list({id(slot.parameter): slot for slot in slots}.values())
        self._states = [optimizer.state[slot.parameter] for slot in self._members]
        self._groups = sorted({slot.group for slot in slots})
        # With the library at hand, a thousand step counts cost one call instead of a thousand.
        self._has_library = any(crew.kernel is cpu for crew in (*self.whole, *self.split))
        self._known_steps: list[Any] = []
        self._counts: cpu.StepCounts | None = None
        self._by_parameter: dict[int, Coefficients] = {}
        self._by_group: dict[int, Coefficients] = {}

    def advance(self, optimizer: LayerwiseOptimizer) -> None:
        """Counts this step, once per parameter, and works out its coefficients."""
        groups = optimizer.param_groups
        steps = [found["step"] for found in self._states]
        values: Sequence[Any] = []
        alike = False
        if any(groups[index]["capturable"] for index in self._groups):
            values = self._advance_on_device(steps, groups)
        elif not self._are_plain(steps):
            values = self._advance_one_by_one(steps)
        elif self._has_library and steps:
            if self._counts is None or self._counts.steps is not self._known_steps:
                self._counts = cpu.StepCounts(self._known_steps)
            values, alike = self._counts.advance()
        elif steps:
            torch._foreach_add_(
                steps, [torch.ones((), device="cpu")] * len(steps)
            )  # a number would be made a tensor for each
            values = torch.stack(steps).tolist()
            alike = len(set(values)) == 1
        self._by_parameter, self._by_group = {}, {}
        if alike:
            self._by_group = {index: optimizer.coefficients(values[0], groups[index]) for index in self._groups}
            return
        known: dict[Any, Coefficients] = {}
        for slot, step in zip(self._members, values):
            key = slot.group, step if isinstance(step, float) else id(step)
            if key not in known:
                known[key] = optimizer.coefficients(step, groups[slot.group])
            self._by_parameter[id(slot.parameter)] = known[key]

    def coefficients(self, crew: Crew) -> list[Coefficients]:
        """This step's, per slot of the crew."""
        if self._by_group:
            return [self._by_group[crew.slots[0].group]] * len(crew.slots)
        return [self._by_parameter[id(slot.parameter)] for slot in crew.slots]

    def _advance_on_device(self, steps: list[Any], groups: Sequence[dict[str, Any]]) -> list[Scalar]:
        torch._foreach_add_(steps, 1)
        return [
            step.to(statistic_dtype(step.device)) if groups[slot.group]["capturable"] else float(step)
            for slot, step in zip(self._members, steps)
        ]

    def _advance_one_by_one(self, steps: list[Any]) -> list[float]:
        for found, step in zip(self._states, steps):
            if isinstance(step, Tensor):
                step += 1
            else:  # an int under DeepSpeed, whose loaders share one tensor between states
                found["step"] = step + 1
        return [float(found["step"]) for found in self._states]

    def _are_plain(self, steps: list[Any]) -> bool:
        """Whether these can be counted together: float32 on the host, each its own."""
        if len(steps) == len(self._known_steps) and all(map(is_, steps, self._known_steps)):
            return True
        plain = all(
            type(step) is Tensor and step.dtype == torch.float32 and step.device.type == "cpu" and step.dim() == 0
            for step in steps
        )
        if plain and len(set(map(Tensor.data_ptr, steps))) == len(steps):
            self._known_steps = steps
            return True
        return False


@uncompiled  # Dynamo would guard on the identity of gradients, which are new tensors at every step
def roster_of(optimizer: LayerwiseOptimizer, plan: LayerPlan, grads: Sequence[Tensor | None]) -> Roster:
    """The roster of this step, its steps counted: the one of an earlier step if that still holds.

    Args:
        optimizer: about to step.
        plan: its own.
        grads: of the plan's slots.
    """
    stamp = _stamp(optimizer, plan)
    if stamp != plan.stamp:  # every earlier roster is out of date, and would keep old states in memory
        plan.rosters.clear()
        plan.kept_states = []
    missing = tuple(index for index, grad in enumerate(grads) if grad is None)
    roster = plan.rosters.get(missing)
    if roster is None:
        slots = [slot for slot, grad in zip(plan.slots, grads) if grad is not None]
        for slot in slots:
            optimizer.state_of(slot)
        roster = Roster(slots, optimizer, plan)
        if len(plan.rosters) >= KEPT:
            plan.rosters.clear()
        plan.rosters[missing] = roster
        plan.kept_states = list(optimizer.state.values())  # alive, so that no id in the stamp is used again
        plan.stamp = _stamp(optimizer, plan)  # states are there now
    roster.advance(optimizer)
    return roster


def _stamp(optimizer: LayerwiseOptimizer, plan: LayerPlan) -> Any:
    """Changes when rosters no longer hold: other dtypes (a model that was cast), states or kernels."""
    options = ("foreach", "fused", "differentiable", "capturable", "state_dtype")
    return (
        tuple(map(_dtype_of, plan.parameters)),
        tuple(map(id, optimizer.state.values())),
        tuple([tuple([group[name] for name in options]) for group in optimizer.param_groups]),
    )
