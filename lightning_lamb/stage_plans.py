"""How ranks and accumulation share the batch of every stage of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lightning_lamb.errors import BatchSizeError, InvalidOptionError
from lightning_lamb.footprint import SentBytes
from lightning_lamb.scaling import accumulate_grad_batches
from lightning_lamb.staged_batches import StagedBatches
from lightning_lamb.stages import Shape, Stage


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
        warmup_fraction: Warm-up as a share of the samples of the schedule that starts here (of its steps, if it was
            given in steps); 0 where none starts.
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


def stage_plans(
    planned: StagedBatches, micro_batch_size: int | Sequence[int], data_parallel_size: int
) -> tuple[StagePlan, ...]:
    """Share every stage's batch among ranks and accumulation, and its schedule's warm-up among the stages.

    Raises:
        InvalidOptionError: Not one micro-batch size, nor one per stage.
        BatchSizeError: The batch of a stage does not divide.
        PlanError: A warm-up is longer than its schedule.
    """
    number = len(planned.stages)
    micro_batches = list(micro_batch_size) if isinstance(micro_batch_size, Sequence) else [micro_batch_size]
    if len(micro_batches) == 1:
        micro_batches *= number
    if len(micro_batches) != number:
        raise InvalidOptionError(
            f"micro_batch_size={list(micro_batches)} has {len(micro_batches)} numbers for {number} stages. Give one "
            "for all stages, or one per stage."
        )
    plans: list[StagePlan] = []
    for group, schedule in zip(planned.schedules(), planned.schedule(), strict=True):
        ramp = schedule.warmup_steps
        for index in group:
            batch, steps = planned.stages[index].global_batch_size, planned.steps[index]
            try:
                accumulation = accumulate_grad_batches(batch, micro_batches[index], data_parallel_size)
            except BatchSizeError as error:
                raise BatchSizeError(f"Stage {index + 1}: {error}" if number > 1 else str(error)) from None
            plans.append(
                StagePlan(
                    global_batch_size=batch,
                    micro_batch_size=micro_batches[index],
                    data_parallel_size=data_parallel_size,
                    accumulate_grad_batches=accumulation,
                    lr=schedule.scale if schedule.lr is None else schedule.lr,
                    warmup_steps=min(ramp, steps),
                    total_steps=steps,
                    warmup_fraction=_share(planned, index, schedule) if index == group[0] else 0.0,
                    sequence_length=planned.stages[index].data.get("sequence_length"),
                    restarts_schedule=index == group[0],
                    shape=schedule.shape,
                )
            )
            ramp -= plans[-1].warmup_steps
    return tuple(plans)


def _share(planned: StagedBatches, index: int, schedule: Stage) -> float:
    """The warm-up as a share: of the samples, as asked for; or of the steps, where it was given in steps."""
    given = planned.stages[index].warmup_steps
    return planned.warmup_fraction(index) if given is None else given / schedule.steps
