"""Completes the learning-rate schedule that the user configured, or adds one, now that the Trainer knows its length."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.errors import ConflictError
from lightning_lamb.lightning_data_seams import steps_ahead
from lightning_lamb.lightning_scheduler_seams import made_by_stock_cli
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    add_step_scheduler,
    scheduler_configs,
)
from lightning_lamb.schedules import Stage, StagedWarmup
from lightning_lamb.stages import total_steps_of


def schedulers_of(trainer: Trainer) -> list[Any]:
    """The schedulers that the Trainer steps."""
    return [config.scheduler for config in scheduler_configs(trainer)]


def staged_warmup_of(trainer: Trainer) -> StagedWarmup | None:
    """The StagedWarmup among them, if there is one."""
    return next((scheduler for scheduler in schedulers_of(trainer) if isinstance(scheduler, StagedWarmup)), None)


def needs_total(trainer: Trainer, asks_for_warmup: bool) -> bool:
    """Whether the length of the training must be known: for a warm-up, or for a StagedWarmup that waits for it."""
    staged = staged_warmup_of(trainer)
    return asks_for_warmup or (staged is not None and staged.total_steps is None)


def set_interval(trainer: Trainer, module: LightningModule, interval: Literal["step", "epoch"] | None) -> list[str]:
    """Decides when schedulers step; ReduceLROnPlateau keeps what it was configured with.

    The stock LightningCLI leaves all at "epoch", whatever they count: an 8-step warm-up would take 8 epochs (Lightning
    issue #15340). What the module's own ``configure_optimizers`` returned, or that of a subclass of LightningCLI, says
    when it steps. StagedWarmup counts optimizer steps always.

    Args:
        trainer: after its optimizers were made.
        module: what it trains.
        interval: for all schedulers; None: "step" for what the stock LightningCLI made, the others are left.

    Returns:
        The names of the schedulers that were changed.
    """
    changed = []
    if interval is None and made_by_stock_cli(module):
        interval = "step"
    for config in scheduler_configs(trainer):
        # Another interval gives the frequency another unit: it was not meant for that.
        wanted = (interval, 1) if interval not in (None, config.interval) else (config.interval, config.frequency)
        if isinstance(config.scheduler, StagedWarmup):
            config.scheduler.follow_optimizer()
            wanted = "step", 1
        if not config.reduce_on_plateau and (config.interval, config.frequency) != wanted:
            config.interval, config.frequency = wanted
            changed.append(type(config.scheduler).__name__)
    return changed


def fill_total_steps(trainer: Trainer) -> None:
    """Gives a StagedWarmup without a length the Trainer's.

    Raises:
        PlanError: the Trainer does not know its length, or the warm-up is longer.
    """
    staged = staged_warmup_of(trainer)
    if staged is not None and staged.total_steps is None:
        staged.set_total_steps(steps_ahead(trainer))


def set_warmup(trainer: Trainer, warmup_steps: int, total_steps: int, **options: Any) -> None:
    """Gives the Trainer's schedule a warm-up: to a StagedWarmup that has none yet, or by adding one.

    Args:
        trainer: after its optimizers were made.
        warmup_steps: optimizer steps of the ramp.
        total_steps: optimizer steps of the training.
        **options: of a StagedWarmup that is added.

    Raises:
        ConflictError: the configured schedule has a warm-up of its own, or cannot take one.
    """
    existing = schedulers_of(trainer)
    if not existing:
        optimizer = trainer.optimizers[0]
        scheduler = StagedWarmup(optimizer, total_steps=total_steps, warmup_steps=warmup_steps, **options)
        scheduler.follow_optimizer()
        add_step_scheduler(trainer, scheduler, name="lr")
        return
    staged = staged_warmup_of(trainer)
    if staged is None:
        names = ", ".join(type(scheduler).__name__ for scheduler in existing)
        raise ConflictError(
            f"LargeBatch was asked for a warm-up, but the schedule is {names}, which it cannot put one before. "
            "Configure StagedWarmup instead (shape: poly, cosine or constant), or remove the warm-up from LargeBatch."
        )
    single = staged.single_stage
    if staged.total_steps is not None or single.warmup_steps or single.warmup_fraction is not None:
        raise ConflictError(
            f"LargeBatch (warm-up of {warmup_steps} steps) and StagedWarmup (total_steps={staged.total_steps}, "
            f"warmup_steps={single.warmup_steps}, warmup_fraction={single.warmup_fraction}) both set the schedule: "
            "give the warm-up to one of them, and leave StagedWarmup's total_steps out if it is LargeBatch."
        )
    staged.single_stage = dataclasses.replace(single, warmup_steps=warmup_steps)
    staged.set_total_steps(total_steps)


def set_stages(trainer: Trainer, stages: list[Stage], **options: Any) -> None:
    """Gives the Trainer's schedule the stages: to a StagedWarmup that has no options of its own, or by adding one.

    Raises:
        ConflictError: the configured schedule says something about the learning rate too.
    """
    existing = schedulers_of(trainer)
    if not existing:
        scheduler = StagedWarmup(trainer.optimizers[0], stages, **options)
        scheduler.follow_optimizer()
        add_step_scheduler(trainer, scheduler, name="lr")
        return
    staged = staged_warmup_of(trainer)
    if staged is None or staged.total_steps is not None or not staged.is_unplanned:
        names = ", ".join(type(scheduler).__name__ for scheduler in existing)
        raise ConflictError(
            f"LargeBatch has stages, which set the learning rate, and the schedule is {names}: remove it, or leave all "
            "options of StagedWarmup out and give warmup_steps, shape, power and decay_from in LargeBatch's stages."
        )
    staged.set_stages(stages)


def permit_other_stages(trainer: Trainer) -> None:
    """Has a StagedWarmup, if it is made already, load a state with other stages and follow its own."""
    staged = staged_warmup_of(trainer)
    if staged is not None:
        staged.on_plan_change = "adopt"


def complete(
    trainer: Trainer, rules: BatchRules, stages: list[Stage] | None, *, adopts: bool
) -> tuple[int | None, int | None]:
    """Completes the Trainer's schedule.

    Args:
        trainer: after its optimizers were made.
        rules: give the warm-up.
        stages: the whole schedule, instead.
        adopts: a checkpoint with another schedule may be loaded; this run's is followed.

    Returns:
        The total and the warm-up steps, as far as they had to be known.
    """
    if adopts:
        permit_other_stages(trainer)
    on_plan_change = "adopt" if adopts else "error"
    if stages is not None:
        set_stages(trainer, stages, on_plan_change=on_plan_change)
        return total_steps_of(stages), None
    if not needs_total(trainer, rules.asks_for_warmup):
        staged = staged_warmup_of(trainer)
        return (None if staged is None else staged.total_steps), None
    total = steps_ahead(trainer)
    if not rules.asks_for_warmup:
        fill_total_steps(trainer)
        return total, None
    ramp = rules.warmup(total, shorten=bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
    set_warmup(trainer, ramp, total, on_plan_change=on_plan_change)
    return total, ramp


_FREQUENCY_COUNTS = {"step": "last micro-batch", "epoch": "epoch"}
"""What Lightning compares a scheduler's ``frequency`` with."""


def describe_schedules(trainer: Trainer) -> str:
    """What steps the learning rate, and when."""
    names = [
        f"{type(config.scheduler).__name__}, stepped after every "
        f"{'optimizer step' if config.interval == 'step' else 'epoch'}"
        + (f" if the number of its {_FREQUENCY_COUNTS[config.interval]} is a multiple of {config.frequency}")
        * (config.frequency != 1)
        for config in scheduler_configs(trainer)
    ]
    return "; ".join(names) or "none: constant learning rate"
