"""How a training is cut into stages, and how ranks and accumulation share the batch of each. Used by the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lightning_lamb.checks import whole_number
from lightning_lamb.errors import BatchSizeError, InvalidOptionError, PlanError
from lightning_lamb.footprint import SentBytes
from lightning_lamb.recipes import Recipe
from lightning_lamb.scaling import accumulate_grad_batches, steps_of_samples, warmup_steps
from lightning_lamb.stages import Shape


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """The numbers of one stage: a part of the training with its own batch and data.

    Attributes:
        global_batch_size: Samples per optimizer step, over all ranks.
        micro_batch_size: Samples per rank and forward pass.
        data_parallel_size: Ranks that see different samples.
        accumulate_grad_batches: Micro-batches per rank and optimizer step.
        lr: Peak learning rate.
        warmup_steps: Optimizer steps of warm-up that fall into this stage.
        total_steps: Optimizer steps of this stage.
        warmup_fraction: Warm-up as a share of the schedule that starts here; 0 where none starts.
        sequence_length: Tokens per sample, or None.
        restarts_schedule: The learning rate warms up from zero here; False: the schedule runs on.
        shape: Decay of the schedule.
        bytes_sent_per_step: Per strategy, what one rank sends for one optimizer step; None without a model size.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    accumulate_grad_batches: int
    lr: float
    warmup_steps: int
    total_steps: int
    warmup_fraction: float
    sequence_length: int | None = None
    restarts_schedule: bool = True
    shape: Shape = "poly"
    bytes_sent_per_step: Mapping[str, SentBytes] | None = None

    @property
    def samples(self) -> int:
        """Samples that this stage sees; the last step may hold fewer than counted here."""
        return self.total_steps * self.global_batch_size


@dataclasses.dataclass(frozen=True)
class Leg:
    """A stage of the training before it is known how ranks and accumulation share its batch."""

    global_batch_size: int
    steps: int
    lr: float
    warmup_fraction: float
    sequence_length: int | None = None
    restarts_schedule: bool = True
    shape: Shape = "poly"


StageT = TypeVar("StageT", Leg, StagePlan)


def schedules(stages: Sequence[StageT]) -> list[list[StageT]]:
    """Group stages by learning-rate schedule: a new one begins where a stage restarts it."""
    groups: list[list[StageT]] = []
    for stage in stages:
        if stage.restarts_schedule or not groups:
            groups.append([])
        groups[-1].append(stage)
    return groups


def growing_legs(samples: int, batch: int, doublings: int, lr: float, fraction: float) -> list[Leg]:
    """Cut a training into stages that see equally many samples, each at twice the batch, at a constant lr.

    Raises:
        PlanError: The warm-up does not fit into the first stage.
    """
    # The fraction speaks of the whole training at the first batch; the ramp must fit into the first of the stages.
    first_fraction = fraction * (doublings + 1)
    if first_fraction > 1.0:
        raise PlanError(
            f"warmup_fraction={fraction:g} of the samples is longer than the first of {doublings + 1} equal stages. "
            f"Use at most {1 / (doublings + 1):.4g}, or fewer doublings."
        )
    share = -(-samples // (doublings + 1))
    return [
        Leg(
            batch * 2**stage,
            steps_of_samples(share, batch * 2**stage),
            lr=lr,
            warmup_fraction=0.0 if stage else first_fraction,
            shape="constant",
        )
        for stage in range(doublings + 1)
    ]


def stage_batches(recipe: Recipe, first_batch: int | None) -> list[int]:
    """Scale every stage's batch of a recipe by the same factor.

    Raises:
        BatchSizeError: A later stage's batch would be no whole number.
    """
    paper_first = recipe.stages[0].global_batch_size
    batch = paper_first if first_batch is None else whole_number("global_batch_size", first_batch)
    for stage in recipe.stages:
        if batch * stage.global_batch_size % paper_first:
            raise BatchSizeError(
                f"global_batch_size={batch}: a later stage of {recipe.name} has {stage.global_batch_size}/{paper_first}"
                f" of the first stage's batch, which is no whole number here. Use a multiple of "
                f"{paper_first // stage.global_batch_size}."
            )
    return [batch * stage.global_batch_size // paper_first for stage in recipe.stages]


def stage_steps(recipe: Recipe, batches: Sequence[int]) -> list[int]:
    """Return the steps of every stage of a recipe, keeping the samples.

    Rounded up where a schedule ends, not at each switch within it: 14063 + 1562 = 15625 steps, as printed.
    """
    steps: list[int] = []
    samples = steps_before = 0
    for stage, batch in zip(recipe.stages, batches, strict=True):
        if stage.restarts_schedule:
            samples = steps_before = 0
        samples += stage.samples
        steps_through = steps_of_samples(samples, batch)
        steps.append(steps_through - steps_before)
        steps_before = steps_through
    return steps


def stage_plans(
    legs: Sequence[Leg], micro_batch_size: int | Sequence[int], data_parallel_size: int
) -> tuple[StagePlan, ...]:
    """Share every stage's batch among ranks and accumulation, and its schedule's warm-up among the stages.

    Raises:
        InvalidOptionError: Not one micro-batch size, nor one per stage.
        BatchSizeError: The batch of a stage does not divide.
    """
    micro_batches = list(micro_batch_size) if isinstance(micro_batch_size, Sequence) else [micro_batch_size]
    if len(micro_batches) == 1:
        micro_batches *= len(legs)
    if len(micro_batches) != len(legs):
        raise InvalidOptionError(
            f"micro_batch_size={list(micro_batches)} has {len(micro_batches)} numbers for {len(legs)} stages. Give one "
            "for all stages, or one per stage."
        )
    plans: list[StagePlan] = []
    for schedule in schedules(legs):
        ramp = warmup_steps(schedule[0].warmup_fraction, sum(leg.steps for leg in schedule))
        for leg in schedule:
            index = len(plans)
            try:
                accumulation = accumulate_grad_batches(leg.global_batch_size, micro_batches[index], data_parallel_size)
            except BatchSizeError as error:
                raise BatchSizeError(f"Stage {index + 1}: {error}" if len(legs) > 1 else str(error)) from None
            plans.append(
                StagePlan(
                    global_batch_size=leg.global_batch_size,
                    micro_batch_size=micro_batches[index],
                    data_parallel_size=data_parallel_size,
                    accumulate_grad_batches=accumulation,
                    lr=schedule[0].lr,
                    warmup_steps=min(ramp, leg.steps),
                    total_steps=leg.steps,
                    warmup_fraction=leg.warmup_fraction if leg is schedule[0] else 0.0,
                    sequence_length=leg.sequence_length,
                    restarts_schedule=leg is schedule[0],
                    shape=leg.shape,
                )
            )
            ramp -= plans[-1].warmup_steps
    return tuple(plans)
