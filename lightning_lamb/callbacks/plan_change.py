"""A checkpoint that was made with another plan: refused, followed, or warmed up for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.callbacks.position import Position
from lightning_lamb.callbacks.schedule import staged_warmup_of
from lightning_lamb.errors import PlanError
from lightning_lamb.lightning_seams import Trainer, batches_per_epoch, steps_per_epoch, total_optimizer_steps
from lightning_lamb.staged_batches import StagedBatches
from lightning_lamb.stages import Stage, stage_at, total_steps_of


def plan_differences(rules: BatchRules, plan: StagedBatches | None, saved: dict[str, Any]) -> list[str]:
    """What differs between this run's plan and a checkpoint's, one line each."""
    theirs = saved.get("stages")
    if plan is None and theirs:
        return [f"stages: {len(theirs)} in the checkpoint, none now"]
    if plan is not None and not theirs:
        return [f"stages: none in the checkpoint, {len(plan.stages)} now"]
    return rules.differences(saved["rules"]) + ([] if plan is None else plan.differences(theirs))


def refuse_changed_plan(differences: Sequence[str], plan: StagedBatches | None) -> None:
    """Refuses to continue with another plan, before anything is loaded.

    Raises:
        PlanError: with the differences, and the stages of this run if it has some.
    """
    if differences:
        shown = "" if plan is None else f"\nThe plan of this run:\n{plan.table()}"
        raise PlanError(
            "the checkpoint was made with another plan; nothing was trained or overwritten:\n"
            + "\n".join(f"  {line}" for line in differences)
            + '\nGive LargeBatch the same values again, or on_plan_change="adopt" to continue with the new ones, or '
            '"rewarm" to warm up for them from zero.' + shown
        )


def length_from(trainer: Trainer, step: int, position: Position) -> int:
    """How many optimizer steps a resumed training makes in all, when its steps before had another batch.

    Args:
        trainer: after its data was loaded.
        step: optimizer steps done.
        position: in the data, in this run's micro-batches.

    Raises:
        PlanError: the training has no end that can be known.
    """
    total = total_optimizer_steps(trainer)
    if trainer.max_epochs in (None, -1):
        return total
    per_epoch = steps_per_epoch(trainer, batches_per_epoch(trainer))
    if math.isinf(per_epoch):
        return total
    seen = position.micro_batches // trainer.accumulate_grad_batches
    by_epochs = step + int(per_epoch) * (trainer.max_epochs - position.epoch) - seen
    return by_epochs if trainer.max_steps == -1 else min(by_epochs, trainer.max_steps)


def warm_up_again(trainer: Trainer, step: int, total_steps: int, warmup_steps: int | None) -> None:
    """Restarts the learning rate from zero at an optimizer step; it then decays over the rest of the stage.

    Args:
        trainer: its StagedWarmup gets the new stages.
        step: optimizer steps done when the plan changed.
        total_steps: of the whole training.
        warmup_steps: of the ramp; None: as long as that of the stage.

    Raises:
        PlanError: there is no StagedWarmup, no warm-up, or nothing left to train.
    """
    staged = staged_warmup_of(trainer)
    if staged is None or staged.stages is None:
        raise PlanError(
            'on_plan_change="rewarm" needs a schedule that can warm up again: leave the scheduler to LargeBatch '
            "(warmup_steps, warmup_fraction or stages), or configure StagedWarmup."
        )
    index, done = stage_at(staged.stages, step)
    rest = staged.stages[index].steps - done + total_steps - total_steps_of(staged.stages)
    ramp = staged.stages[index].warmup_steps if warmup_steps is None else warmup_steps
    if rest < 1 or ramp < 1:
        raise PlanError(
            f'on_plan_change="rewarm": at step {step} of {total_steps}, {rest} steps are left of the stage, and the '
            f"warm-up has {ramp} steps. Both must be at least 1: give rewarm_steps, or train for longer."
        )
    staged.on_plan_change = "adopt"
    staged.set_stages(list(_split(staged.stages, index, done, rest, min(ramp, rest))))


def _split(stages: Sequence[Stage], index: int, done: int, rest: int, ramp: int) -> list[Stage]:
    """The stages with one cut in two, of which the second part warms up."""
    cut = stages[index]
    before = [dataclasses.replace(cut, steps=done, warmup_steps=min(cut.warmup_steps, done))] if done else []
    return [*stages[:index], *before, dataclasses.replace(cut, steps=rest, warmup_steps=ramp), *stages[index + 1 :]]
