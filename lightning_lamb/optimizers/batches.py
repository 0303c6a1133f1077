"""Sorts slots into crews that one kernel call can take, and says which kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lamb.equations import Coefficients, Scalar, statistic_dtype
from lightning_lamb.kernels import Batch, Kernel, Options, eager, foreach, rounding
from lightning_lamb.optimizers import loss_scaling
from lightning_lamb.optimizers.choice import kernel_for
from lightning_lamb.optimizers.gradients import local_gradient
from lightning_lamb.optimizers.plan import Slot
from lightning_lamb.optimizers.state import has_master, is_narrow
from lightning_lamb.sharding.layout import is_whole_view

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

_dtype_of = attrgetter("dtype")

WHOLE_BATCH_BYTES = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Whole layers are applied right after their direction is known. On a CPU a batch of small layers that fits the cache
is read from memory once; on a GPU fewer, larger launches win. A larger layer is a batch of its own."""


@dataclass
class Crew:
    """Slots that share group, exemption, device and dtypes, and what does not change about them from step to step.

    Attributes:
        slots: one piece of a layer each.
        states: the optimizer state of each slot's parameter.
        positions: of the slots in the plan.
        kernel: who computes their passes.
        names: of the layers.
        moment_dtype: of their moments.
        is_plain: whether every slot is a whole parameter that is an ordinary tensor, so that no view need be taken.
        memory: the kernel's own, see `Batch.memory`.
    """

    slots: list[Slot]
    states: list[dict[str, Any]]
    positions: list[int]
    kernel: Kernel
    names: list[str]
    moment_dtype: torch.dtype
    is_plain: bool
    memory: dict[str, Any] = field(default_factory=dict)

    def batch(
        self,
        optimizer: LayerwiseOptimizer,
        coefficients: list[Coefficients],
        grad_scale: Tensor | None,
        grads: Sequence[Tensor | None] | None = None,
    ) -> Batch:
        """This step's batch.

        Args:
            optimizer: whose slots they are.
            coefficients: of this step, per slot.
            grad_scale: clip coefficient, or None.
            grads: of all slots of the plan, if they have been looked up.
        """
        first = self.slots[0]
        self._settle(optimizer)
        seeds = []
        if is_narrow(self.states[0]):
            seeds = [rounding.seed(float(state["step"]), at) for state, at in zip(self.states, self.positions)]
        return Batch(
            options=options_of(first, optimizer),
            weights=self._weights(optimizer),
            grads=self._gradients(grads),
            moments1=self._tensors("exp_avg"),
            moments2=self._tensors("exp_avg_sq") if optimizer.base == "adam" else [],
            coefficients=coefficients,
            grad_scale=None if grad_scale is None else grad_scale.to(first.device),
            parameters=self._parameters() if has_master(first.parameter) else [],
            seeds=seeds,
            memory=self.memory,
        )

    def _settle(self, optimizer: LayerwiseOptimizer) -> None:
        """Casts state that somebody replaced by another dtype; the fused kernels look at every tensor themselves."""
        if self.kernel in (eager, foreach):
            moments = [state[key] for key in optimizer.moment_keys() for state in self.states]
            if set(map(_dtype_of, moments)) != {self.moment_dtype}:
                for slot in self.slots:
                    optimizer.state_of(slot)

    def _weights(self, optimizer: LayerwiseOptimizer) -> list[Tensor]:
        if has_master(self.slots[0].parameter):
            return self._tensors("master_weight")
        if self.is_plain:
            return [slot.parameter for slot in self.slots]
        local = [slot.piece.view(slot.parameter) for slot in self.slots]
        return local if optimizer.defaults["differentiable"] else [tensor.detach() for tensor in local]

    def _parameters(self) -> list[Tensor]:
        # A view before detach(), which costs a DTensor ten times as much.
        return [slot.piece.view(slot.parameter).detach() for slot in self.slots]

    def _tensors(self, key: str) -> list[Tensor]:
        if self.is_plain:
            return [state[key] for state in self.states]
        return [slot.piece.view(state[key]) for slot, state in zip(self.slots, self.states)]

    def _gradients(self, grads: Sequence[Tensor | None] | None) -> list[Tensor]:
        found: list[Tensor | None]
        if self.is_plain and grads is not None:
            found = [grads[position] for position in self.positions]
        elif self.is_plain:
            found = [slot.parameter.grad for slot in self.slots]
        else:
            found = [local_gradient(slot) for slot in self.slots]
        return [grad for grad in found if grad is not None]


def crews_of(
    slots: Sequence[Slot], optimizer: LayerwiseOptimizer, positions: dict[int, int], whole: bool
) -> list[Crew]:
    """Sorts slots into crews.

    Args:
        slots: their parameters have state.
        optimizer: whose they are.
        positions: by id of the slot, see `Crew`.
        whole: cut crews to `WHOLE_BATCH_BYTES`, so that updates of few layers exist at a time.
    """
    alike: dict[Any, list[Slot]] = {}
    for slot in slots:
        dtypes = slot.parameter.dtype, optimizer.state[slot.parameter]["exp_avg"].dtype
        alike.setdefault((slot.group, slot.adapt, slot.exempt, slot.device, *dtypes), []).append(slot)
    crews = []
    for members in alike.values():
        group = optimizer.param_groups[members[0].group]
        kernel, together = kernel_for(group, members, is_narrow(optimizer.state[members[0].parameter]))
        limit = WHOLE_BATCH_BYTES.get(members[0].device.type, 1 << 28) if together == "cached" else 0
        parts = _parts(members, limit if whole and together != "all" else None)
        crews += [_crew(part, optimizer, positions, kernel) for part in parts]
    return crews


def _crew(slots: list[Slot], optimizer: LayerwiseOptimizer, positions: dict[int, int], kernel: Kernel) -> Crew:
    return Crew(
        slots=slots,
        states=[optimizer.state[slot.parameter] for slot in slots],
        positions=[positions[id(slot)] for slot in slots],
        kernel=kernel,
        names=[slot.piece.layer.name for slot in slots],
        moment_dtype=optimizer.state[slots[0].parameter]["exp_avg"].dtype,
        is_plain=all(is_whole_view(slot.piece) for slot in slots),
    )


def scales_of(group: dict[str, Any], coefficients: Sequence[Coefficients]) -> list[Scalar]:
    """Per slot, what its trust ratio is multiplied by: the learning rate, corrected."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(statistic_dtype(lr.device)).reshape(())
    first = coefficients[0]
    if all(map(is_, coefficients, repeat(first))):
        return [lr * first.lr] * len(coefficients)
    return [lr * at.lr for at in coefficients]


def options_of(slot: Slot, optimizer: LayerwiseOptimizer) -> Options:
    """The options that the slot's batch shares."""
    group = optimizer.param_groups[slot.group]
    beta1, beta2 = optimizer.moment_decays(group)
    return Options(
        base=optimizer.base,
        beta1=beta1,
        beta2=beta2,
        eps=group.get("eps", 0.0),
        weight_decay=0.0 if slot.exempt else group["weight_decay"],
        norm=slot.norm,
        adapt=slot.adapt,
        maximize=group["maximize"],
        max_grad_value=loss_scaling.bound(optimizer, group),
        differentiable=group["differentiable"],
    )


def _parts(slots: list[Slot], limit: int | None) -> Iterator[list[Slot]]:
    """Slots of at most ``limit`` bytes together, or a larger one alone; one between small ones does not part them."""
    part: list[Slot] = []
    size = 0
    for slot in slots:
        bytes_here = slot.parameter.numel() * slot.parameter.element_size()
        if limit is not None and bytes_here > limit:
            yield [slot]
            continue
        if part and limit is not None and size + bytes_here > limit:
            yield part
            part, size = [], 0
        part.append(slot)
        size += bytes_here
    if part:
        yield part
