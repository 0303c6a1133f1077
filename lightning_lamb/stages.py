"""The learning rate as a pure function of the optimizer step: stages that each warm up from zero and then decay.

Resume, plots and tests need nothing but this function; :mod:`lightning_lamb.schedules` hangs it on an optimizer.
Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_lamb.checks import did_you_mean, finite_number, one_of, whole_number
from lightning_lamb.errors import InvalidOptionError, PlanError

Shape = Literal["poly", "cosine", "constant"]
DecayFrom = Literal["start", "peak"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the learning rate: a linear ramp from zero, then a decay.

    Args:
        steps: Optimizer steps in this stage, warm-up included.
        warmup_steps: Steps of the linear ramp; step ``i`` (from 0) of the stage has ``(i + 1) / warmup_steps`` of the
            peak.
        lr: Peak learning rate. It is the peak of the first parameter group; the other groups keep their ratio to it.
            None: ``scale`` times each group's own base learning rate.
        scale: Peak as a multiple of each group's base learning rate; only without ``lr``.
        power: Exponent of the polynomial decay; 1 is linear, the paper's.
        shape: ``"poly"``: ``(1 - progress) ** power``; ``"cosine"``: half a cosine; ``"constant"``: no decay.
        decay_from: ``"start"``: progress counts from the stage's first step, so the rate steps down after the ramp
            (``1 - t/T``, the paper's and BERT's); ``"peak"``: it counts from the end of the ramp, without that step.
        end: Share of the peak that the decay ends at.

    Raises:
        InvalidOptionError: A value is out of range, or without effect beside the others.
        PlanError: The warm-up is longer than the stage.

    Example:
        >>> Stage(steps=6, warmup_steps=2, lr=0.01).lr
        0.01
    """

    steps: int
    warmup_steps: int = 0
    lr: float | None = None
    scale: float = 1.0
    power: float = 1.0
    shape: Shape = "poly"
    decay_from: DecayFrom = "start"
    end: float = 0.0

    def __post_init__(self) -> None:
        """Check every field, and that each does something."""
        whole_number("steps", self.steps)
        whole_number("warmup_steps", self.warmup_steps, at_least=0)
        if self.lr is not None:
            finite_number("lr", self.lr, at_least=0.0)
        finite_number("scale", self.scale, at_least=0.0)
        finite_number("power", self.power, above=0.0)
        one_of("shape", self.shape, ("poly", "cosine", "constant"))
        one_of("decay_from", self.decay_from, ("start", "peak"))
        finite_number("end", self.end, at_least=0.0, at_most=1.0)
        if self.lr is not None and self.scale != 1.0:
            raise InvalidOptionError(f"lr={self.lr!r} and scale={self.scale!r} both set the peak. Give one of them.")
        if self.power != 1.0 and self.shape != "poly":
            raise InvalidOptionError(f"power={self.power!r} has no effect with shape={self.shape!r}. Leave it out.")
        if self.end != 0.0 and self.shape == "constant":
            raise InvalidOptionError(f"end={self.end!r} has no effect with shape='constant'. Leave it out.")
        if self.warmup_steps > self.steps:
            raise PlanError(
                f"warmup_steps={self.warmup_steps} is above the stage's steps={self.steps}. Shorten the warm-up or "
                "lengthen the stage."
            )


def as_stages(stages: Sequence[Stage | Mapping[str, Any]]) -> tuple[Stage, ...]:
    """Turn what YAML and JSON give (a list of plain dicts) into checked stages.

    Raises:
        InvalidOptionError: Not a list, an element is no dict, a key is unknown or missing, a value is out of range.
        PlanError: No stages, or a warm-up longer than its stage.

    Example:
        >>> as_stages([{"steps": 4, "warmup_step": 2}])
        Traceback (most recent call last):
        lightning_lamb.errors.InvalidOptionError: stages[0]: unknown key 'warmup_step'. Did you mean 'warmup_steps'? Known: steps, warmup_steps, lr, scale, power, shape, decay_from, end.
    """  # noqa: E501  # a doctest's expected message cannot be wrapped
    if isinstance(stages, (str, bytes, Mapping)) or not isinstance(stages, Sequence):
        raise InvalidOptionError(f"stages={stages!r} must be a list of stages, each a Stage or a dict of its fields.")
    if not stages:
        raise PlanError("stages=[] has no stage. Give at least one, such as {'steps': 1000, 'warmup_steps': 100}.")
    return tuple(_as_stage(index, stage) for index, stage in enumerate(stages))


def _as_stage(index: int, stage: Stage | Mapping[str, Any]) -> Stage:
    if isinstance(stage, Stage):
        return stage
    where = f"stages[{index}]"
    if not isinstance(stage, Mapping):
        raise InvalidOptionError(f"{where}={stage!r} must be a Stage or a dict of its fields.")
    known = [field.name for field in dataclasses.fields(Stage)]
    for key in stage:
        if key not in known:
            raise InvalidOptionError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, known)} Known: {', '.join(known)}."
            )
    if "steps" not in stage:
        raise InvalidOptionError(f"{where}: the key 'steps' is missing. Give the optimizer steps of the stage.")
    try:
        return Stage(**stage)
    except (InvalidOptionError, PlanError) as error:
        raise type(error)(f"{where}: {error}") from None


def total_steps_of(stages: Sequence[Stage]) -> int:
    """Return the optimizer steps of all stages together.

    Example:
        >>> total_steps_of([Stage(steps=7037), Stage(steps=1562)])
        8599
    """
    return sum(stage.steps for stage in stages)


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, int]:
    """Return ``(index of the stage, steps already done in it)`` for the ``step``-th optimizer step (from 0).

    After the last stage: the last stage, with all its steps done.

    Raises:
        InvalidOptionError: ``step`` is no whole number, or negative.
        PlanError: no stages.

    Example:
        >>> stages = [Stage(steps=6), Stage(steps=4)]
        >>> stage_at(stages, 5), stage_at(stages, 6), stage_at(stages, 99)
        ((0, 5), (1, 0), (1, 4))
    """
    done = whole_number("step", step, at_least=0)
    last = len(stages) - 1
    for index, stage in enumerate(stages):
        if done < stage.steps or index == last:
            return index, min(done, stage.steps)
        done -= stage.steps
    raise PlanError("stages=[] has no stage. Give at least one.")


def multiplier(stages: Sequence[Stage], step: int) -> float:
    """Return the learning rate of an optimizer step as a share (0 to 1) of its stage's peak.

    Within a stage of ``T`` steps with ``w`` steps of warm-up, after ``d`` steps of it::

        d < w:                      (d + 1) / w
        else, decay_from="start":   end + (1 - end) * (1 - d / T) ** power
        else, decay_from="peak":    end + (1 - end) * (1 - (d - w) / (T - w)) ** power

    After the last stage the decay stays at its end.

    Args:
        stages: The whole plan.
        step: Optimizer steps already done, over all stages.

    Example:
        >>> stages = [Stage(steps=6, warmup_steps=2), Stage(steps=4, warmup_steps=2)]
        >>> [round(multiplier(stages, step), 3) for step in range(11)]
        [0.5, 1.0, 0.667, 0.5, 0.333, 0.167, 0.5, 1.0, 0.5, 0.25, 0.0]
    """
    index, done = stage_at(stages, step)
    stage = stages[index]
    if done < stage.warmup_steps:
        return (done + 1) / stage.warmup_steps
    if stage.shape == "constant":
        return 1.0
    decay_start = stage.warmup_steps if stage.decay_from == "peak" else 0
    decay_steps = stage.steps - decay_start
    remaining = 1.0 - (done - decay_start) / decay_steps if decay_steps else 0.0
    share = remaining**stage.power if stage.shape == "poly" else 0.5 * (1.0 - math.cos(math.pi * remaining))
    return stage.end + (1.0 - stage.end) * share


def learning_rate(stages: Sequence[Stage], step: int, base_lr: float, first_base_lr: float | None = None) -> float:
    """Return the learning rate of one parameter group at an optimizer step.

    Args:
        stages: The whole plan.
        step: Optimizer steps already done, over all stages.
        base_lr: The group's base learning rate.
        first_base_lr: Base learning rate of the first group, which a stage's absolute ``lr`` speaks of; None: this
            group is the first.

    Raises:
        PlanError: A stage's ``lr`` cannot be shared out because the first group's base learning rate is 0.

    Example:
        >>> stages = [Stage(steps=4, warmup_steps=2, lr=0.01)]
        >>> learning_rate(stages, 1, base_lr=1.0), learning_rate(stages, 1, base_lr=0.5, first_base_lr=1.0)
        (0.01, 0.005)
    """
    stage = stages[stage_at(stages, step)[0]]
    share = multiplier(stages, step)
    if stage.lr is None:
        return base_lr * stage.scale * share
    if first_base_lr is None or base_lr == first_base_lr:
        return stage.lr * share
    if first_base_lr == 0.0:
        raise PlanError(
            f"lr={stage.lr!r} of a stage is the peak of the first parameter group, and the others keep their ratio to "
            f"it; but that group's base learning rate is 0 and another's is {base_lr!r}. Give the first group a "
            "learning rate above 0, or use `scale` instead of `lr` in the stages."
        )
    return stage.lr * (base_lr / first_base_lr) * share


def plan_difference(old: Sequence[Stage], new: Sequence[Stage], *, old_name: str, new_name: str) -> str:
    """Describe, line by line, how two plans differ; empty when they do not.

    Example:
        >>> print(plan_difference([Stage(6)], [Stage(8), Stage(4)], old_name="checkpoint", new_name="this run"))
        stages[0].steps: 6 in checkpoint, 8 in this run
        stages[1]: only in this run (steps=4)
    """
    lines = []
    for index in range(max(len(old), len(new))):
        if index >= len(old) or index >= len(new):
            name, stages = (new_name, new) if index >= len(old) else (old_name, old)
            lines.append(f"stages[{index}]: only in {name} (steps={stages[index].steps})")
            continue
        for field in dataclasses.fields(Stage):
            before, after = getattr(old[index], field.name), getattr(new[index], field.name)
            if before != after:
                lines.append(f"stages[{index}].{field.name}: {before!r} in {old_name}, {after!r} in {new_name}")
    return "\n".join(lines)
