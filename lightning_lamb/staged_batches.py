"""The one planner: steps, learning rates and warm-ups of a training, for the command line and for LargeBatch.

A training with one batch is a training in one stage. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.batch_stages import BatchStage
from lightning_lamb.checks import whole_number
from lightning_lamb.errors import PlanError
from lightning_lamb.scaling import scaled_lr, scaled_warmup_fraction, warmup_steps_of_stages
from lightning_lamb.stages import Stage


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
        """Turns shares of the samples into steps: rounded where a stage ends, so that the rounding does not add up.

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
        # Through the decimal text: a tenth is a tenth.
        per_sample = [Fraction(repr(float(stage.share or 0.0))) / stage.global_batch_size for stage in stages]
        if total_samples is not None:
            samples = Fraction(whole_number("total_samples", total_samples))
        elif max_steps is not None:
            samples = Fraction(max_steps) / sum(per_sample, Fraction())
        else:
            raise PlanError(
                "stages with a share of the samples need the length of the training: give "
                "LargeBatch(total_samples=...), or Trainer(max_steps=...)."
            )
        ends = [math.floor(samples * sum(per_sample[: index + 1]) + Fraction(1, 2)) for index in range(len(stages))]
        steps = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if min(steps) < 1:
            raise PlanError(f"{ends[-1]} optimizer steps are too few: the stages would have {steps} of them.")
        return cls(
            tuple(dataclasses.replace(stage, steps=n, share=None) for stage, n in zip(stages, steps, strict=True)),
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

    def schedules(self) -> list[list[int]]:
        """The stages (by index) of every learning-rate schedule: a new one begins where a stage restarts it."""
        groups: list[list[int]] = []
        for index, stage in enumerate(self.stages):
            if stage.restarts_schedule:
                groups.append([])
            groups[-1].append(index)
        return groups

    def schedule(self) -> list[Stage]:
        """The stages of the learning rate, for StagedWarmup.

        Raises:
            PlanError: a warm-up is longer than what it warms up for.
        """
        return [self._schedule_of(group) for group in self.schedules()]

    def _schedule_of(self, group: list[int]) -> Stage:
        """One warm-up and decay, over the stages from its start to the next."""
        first, rules = self.stages[group[0]], self.rules
        ramp = first.warmup_steps
        if ramp is None:
            steps, batches = zip(*((self.steps[i], self.stages[i].global_batch_size) for i in group), strict=True)
            ramp = warmup_steps_of_stages(self.warmup_fraction(group[0]), steps, batches)
        lr, scale = first.lr, 1.0
        if lr is None and rules.base_lr is not None:
            lr = scaled_lr(rules.base_lr, self._base, first.global_batch_size, rules.lr_scaling)
        elif lr is None:
            scale = scaled_lr(1.0, self._base, first.global_batch_size, rules.lr_scaling)
        total = sum(self.steps[index] for index in group)
        return Stage(total, ramp, lr, scale, first.power, first.shape, first.decay_from, first.end)

    def warmup_fraction(self, index: int) -> float:
        """The share of the samples of its schedule that is warm-up, where a stage starts one by a fraction."""
        stage = self.stages[index]
        if stage.warmup_fraction is not None:
            return stage.warmup_fraction
        return scaled_warmup_fraction(self.rules.warmup_fraction, self._base, stage.global_batch_size)

    @property
    def _base(self) -> int:
        return self.rules.base_batch_size or self.stages[0].global_batch_size

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
