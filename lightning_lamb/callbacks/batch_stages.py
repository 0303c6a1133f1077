"""A training in stages, each with its own batch, data and learning rate: arithmetic, no Trainer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lamb.callbacks.rules import BatchRules
from lightning_lamb.checks import did_you_mean, finite_number, whole_number
from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.plan import plan_from_recipe
from lightning_lamb.scaling import scaled_lr, scaled_warmup_fraction
from lightning_lamb.scaling import warmup_steps as steps_of_fraction
from lightning_lamb.stages import DecayFrom, Shape, Stage


@dataclasses.dataclass(frozen=True)
class BatchStage:
    """One stage of a training.

    Args:
        global_batch_size: Samples per optimizer step, over all ranks.
        steps: Optimizer steps of the stage.
        share: Share of the training's samples that the stage sees, instead of steps; in all stages or in none.
        micro_batch_size: Samples per forward pass and rank. None: LargeBatch's, or the data module's batch_size.
        data: Attributes (or hyper-parameters) of the data module that are set before its train_dataloader is called
            for the stage, e.g. {"sequence_length": 128}.
        lr: Peak learning rate. None: base_lr (or the optimizer's own) scaled from base_batch_size to this batch.
        warmup_steps: Optimizer steps of warm-up from zero.
        warmup_fraction: Warm-up as a share of the stage's steps, instead. Neither: LargeBatch's warmup_fraction, scaled
            from base_batch_size to this batch.
        power: Exponent of the polynomial decay.
        shape: "poly", "cosine" or "constant".
        decay_from: "start" or "peak" of the stage; see lightning_lamb.stages.Stage.
        end: Share of the peak that the decay ends at.
        restarts_schedule: The learning rate warms up again. False: the schedule of the stage before runs on over this
            one, which then has no lr, warm-up or decay of its own.
    """

    global_batch_size: int
    steps: int | None = None
    share: float | None = None
    micro_batch_size: int | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float | None = None
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    power: float = 1.0
    shape: Shape = "poly"
    decay_from: DecayFrom = "start"
    end: float = 0.0
    restarts_schedule: bool = True

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        whole_number("global_batch_size", self.global_batch_size)
        if (self.steps is None) == (self.share is None):
            raise InvalidOptionError(f"steps={self.steps} and share={self.share}: give one of them.")
        if self.steps is not None:
            whole_number("steps", self.steps)
        if self.share is not None:
            finite_number("share", self.share, above=0.0, at_most=1.0)
        if self.micro_batch_size is not None:
            whole_number("micro_batch_size", self.micro_batch_size)
        data: Any = self.data  # YAML may hold anything
        if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
            raise InvalidOptionError(f"data={self.data!r} must be a dict of the data module's attributes.")
        if self.warmup_fraction is not None:
            finite_number("warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0)
            if self.warmup_steps is not None:
                raise InvalidOptionError(
                    f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} both set the "
                    "warm-up: give one."
                )
        ramp = whole_number("warmup_steps", self.warmup_steps or 0, at_least=0)
        Stage(max(ramp, self.steps or 1), ramp, self.lr, 1.0, self.power, self.shape, self.decay_from, self.end)
        if self.steps is not None and ramp > self.steps:
            raise PlanError(f"warmup_steps={ramp} is above the stage's steps={self.steps}.")
        if not self.restarts_schedule:
            self._refuse_schedule()

    def _refuse_schedule(self) -> None:
        """Refuses what has no effect where the schedule of the stage before runs on."""
        for field in dataclasses.fields(self):
            ignored = field.name in ("lr", "warmup_steps", "warmup_fraction", "power", "shape", "decay_from", "end")
            if ignored and getattr(self, field.name) != field.default:
                raise InvalidOptionError(
                    f"{field.name}={getattr(self, field.name)!r} has no effect with restarts_schedule=False: the "
                    "schedule of the stage before runs on. Leave it out, or set it there."
                )


def as_batch_stages(stages: Sequence[BatchStage | Mapping[str, Any]]) -> tuple[BatchStage, ...]:
    """Turns what YAML and the command line give into checked stages.

    Raises:
        InvalidOptionError: not a list, an unknown or missing key, or a value out of range.
        PlanError: no stage, shares and steps mixed, or shares that are not 1 in all.
    """
    if isinstance(stages, (str, bytes, Mapping)) or not isinstance(stages, Sequence):
        raise InvalidOptionError(f"stages={stages!r} must be a list of stages, each a BatchStage or a dict.")
    if not stages:
        raise PlanError("stages=[] has no stage: give at least one, or leave it out.")
    made = tuple(_as_batch_stage(index, stage) for index, stage in enumerate(stages))
    if not made[0].restarts_schedule:
        raise PlanError("stages[0]: restarts_schedule=False, but there is no schedule before it that could run on.")
    shares = [stage.share for stage in made]
    if any(share is None for share in shares) and any(share is not None for share in shares):
        raise PlanError(f"some stages have a share and some have steps (shares: {shares}): give one kind in all.")
    if shares[0] is not None and not math.isclose(sum(filter(None, shares)), 1.0, abs_tol=1e-6):
        raise PlanError(f"the shares {shares} add up to {sum(filter(None, shares)):g}, not to 1.")
    return made


def _as_batch_stage(index: int, stage: BatchStage | Mapping[str, Any]) -> BatchStage:
    if isinstance(stage, BatchStage):
        return stage
    if not isinstance(stage, Mapping):
        raise InvalidOptionError(f"stages[{index}]={stage!r} must be a BatchStage or a dict of its fields.")
    known = [field.name for field in dataclasses.fields(BatchStage)]
    for key in stage:
        if key not in known:
            raise InvalidOptionError(
                f"stages[{index}]: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}. "
                "Attributes of the data module belong into data={...}."
            )
    if "global_batch_size" not in stage:
        raise InvalidOptionError(f"stages[{index}]: the key 'global_batch_size' is missing.")
    try:
        return BatchStage(**stage)
    except (InvalidOptionError, PlanError) as error:
        raise type(error)(f"stages[{index}]: {error}") from None


def stages_of_recipe(
    recipe: str,
    global_batch_size: int | None,
    base_batch_size: int | None,
    base_lr: float | None,
    warmup_fraction: float | None,
    lr_scaling: Any,
) -> tuple[BatchStage, ...]:
    """The stages of a recipe that changes its batch; ``sequence_length`` becomes the data module's."""
    plan = plan_from_recipe(
        recipe,
        micro_batch_size=1,
        data_parallel_size=1,
        global_batch_size=global_batch_size,
        base_lr=base_lr,
        base_batch_size=base_batch_size,
        warmup_fraction=warmup_fraction,
        lr_scaling=lr_scaling,
    )
    return tuple(
        BatchStage(
            global_batch_size=stage.global_batch_size,
            steps=stage.total_steps,
            data={} if stage.sequence_length is None else {"sequence_length": stage.sequence_length},
            lr=stage.lr if stage.restarts_schedule else None,
            warmup_steps=stage.warmup_steps if stage.restarts_schedule else None,
            shape=stage.shape if stage.restarts_schedule else "poly",
            restarts_schedule=stage.restarts_schedule,
        )
        for stage in plan.stages
    )


def growing_stages(global_batch_size: int, doublings: int) -> tuple[BatchStage, ...]:
    """Stages that see equally many samples, each at twice the batch, under one constant learning rate.

    Smith et al., "Don't decay the learning rate, increase the batch size" (arXiv 1711.00489).
    """
    number = whole_number("doublings", doublings) + 1
    first = BatchStage(global_batch_size, share=1 / number, shape="constant")
    later = [
        BatchStage(global_batch_size * 2**index, share=1 / number, restarts_schedule=False)
        for index in range(1, number)
    ]
    return (first, *later)


@dataclasses.dataclass(frozen=True)
class StagedBatches:
    """The plan of a training in stages.

    Attributes:
        stages: with their steps known.
        rules: what gives learning rates and warm-ups that a stage leaves out.
    """

    stages: tuple[BatchStage, ...]
    rules: BatchRules

    @classmethod
    def of(
        cls, stages: tuple[BatchStage, ...], rules: BatchRules, max_steps: int | None, total_samples: int | None
    ) -> StagedBatches:
        """Turns shares of the samples into steps.

        Args:
            stages: all with steps, or all with shares.
            rules: for what a stage leaves out.
            max_steps: the Trainer's, None if it has none; a length for shares.
            total_samples: samples of the training; the other length for shares.

        Raises:
            PlanError: the length is unknown, given twice, or too short for a step in every stage.
        """
        if stages[0].share is None:
            if total_samples is not None:
                raise PlanError(f"total_samples={total_samples} has no effect on stages that give their steps.")
            return cls(stages, rules)
        per_sample = [float(stage.share or 0.0) / stage.global_batch_size for stage in stages]
        if total_samples is None:
            if max_steps is None:
                raise PlanError(
                    "stages with a share of the samples need the length of the training: give "
                    "LargeBatch(total_samples=...), or Trainer(max_steps=...)."
                )
            total_samples = math.ceil(max_steps / sum(per_sample))
            total = max_steps
        else:
            total = max(len(stages), round(whole_number("total_samples", total_samples) * sum(per_sample)))
        ends, seen = [], 0.0
        for rate in per_sample:
            seen += rate
            ends.append(round(total * seen / sum(per_sample)))
        steps = [end - start for start, end in zip([0, *ends[:-1]], ends)]
        if min(steps) < 1:
            raise PlanError(f"{total} optimizer steps are too few: the stages would have {steps} of them.")
        return cls(
            tuple(dataclasses.replace(stage, steps=n, share=None) for stage, n in zip(stages, steps)),
            rules,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(self.steps)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of each stage."""
        return [stage.steps or 0 for stage in self.stages]

    def at(self, step: int) -> int:
        """The index of the stage of the ``step``-th optimizer step, from 0; the last one after the end."""
        for index in range(len(self.stages)):
            if step < self.end_of(index):
                return index
        return len(self.stages) - 1

    @property
    def ends(self) -> list[int]:
        """Optimizer steps done at the end of each stage."""
        return [self.end_of(index) for index in range(len(self.stages))]

    def end_of(self, index: int) -> int:
        """Optimizer steps done when a stage is."""
        return sum(self.steps[: index + 1])

    def schedule(self) -> list[Stage]:
        """The stages of the learning rate, for StagedWarmup.

        Raises:
            PlanError: a warm-up is longer than what it warms up for.
        """
        groups: list[list[int]] = []
        for index, stage in enumerate(self.stages):
            if stage.restarts_schedule:
                groups.append([])
            groups[-1].append(index)
        return [self._schedule_of(group) for group in groups]

    def _schedule_of(self, group: list[int]) -> Stage:
        """One warm-up and decay, over the stages from its start to the next."""
        first, rules = self.stages[group[0]], self.rules
        steps = sum(self.steps[index] for index in group)
        base = rules.base_batch_size or self.stages[0].global_batch_size
        ramp = first.warmup_steps
        if ramp is None:
            fraction = first.warmup_fraction
            if fraction is None:
                fraction = scaled_warmup_fraction(rules.warmup_fraction, base, first.global_batch_size)
            ramp = steps_of_fraction(fraction, steps)
        lr, scale = first.lr, 1.0
        if lr is None and rules.base_lr is not None:
            lr = scaled_lr(rules.base_lr, base, first.global_batch_size, rules.lr_scaling)
        elif lr is None:
            scale = scaled_lr(1.0, base, first.global_batch_size, rules.lr_scaling)
        return Stage(steps, ramp, lr, scale, first.power, first.shape, first.decay_from, first.end)

    def to_list(self) -> list[dict[str, Any]]:
        """The stages as numbers, strings, lists and dicts, for a checkpoint; without what may change on resume."""
        return [
            {
                name: value
                for name, value in dataclasses.asdict(stage).items()
                if name not in ("micro_batch_size", "share")
            }
            for stage in self.stages
        ]

    def differences(self, saved: Sequence[Mapping[str, Any]] | None) -> list[str]:
        """What differs from the stages in a checkpoint, one line each."""
        ours, theirs = self.to_list(), list(saved or [])
        lines = []
        for index in range(max(len(ours), len(theirs))):
            if index >= len(theirs) or index >= len(ours):
                where = "in the checkpoint" if index >= len(ours) else "now"
                stage = (theirs if index >= len(ours) else ours)[index]
                lines.append(
                    f"stages[{index}]: only {where} (steps={stage['steps']}, "
                    f"global_batch_size={stage['global_batch_size']})"
                )
                continue
            for name, value in ours[index].items():
                if theirs[index].get(name) != value:
                    lines.append(
                        f"stages[{index}].{name}: {theirs[index].get(name)!r} in the checkpoint, {value!r} now"
                    )
        return lines

    def table(self) -> str:
        """The plan as text, one line per stage."""
        schedule = iter(self.schedule())
        rows = [("stage", "steps", "global batch", "peak lr", "warm-up", "data")]
        for index, stage in enumerate(self.stages):
            lr, ramp = "runs on", ""
            if stage.restarts_schedule:
                decided = next(schedule)
                lr = f"{decided.lr:g}" if decided.lr is not None else f"{decided.scale:g} x the optimizer's"
                ramp = str(decided.warmup_steps)
            start = self.end_of(index) - self.steps[index]
            data = ", ".join(f"{name}={value}" for name, value in stage.data.items())
            steps = f"{self.steps[index]} ({start} to {self.end_of(index)})"
            rows.append((str(index + 1), steps, str(stage.global_batch_size), lr, ramp, data))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"in all {self.total_steps} optimizer steps"])
