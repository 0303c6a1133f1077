"""The learning rates of one ``fit``: scaled once, announced, kept over a resume, and compared with what trains."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.callbacks import schedule
from lightning_lamb.callbacks.conflicts import refuse_finder_beside_schedulers, refuse_no_optimizer
from lightning_lamb.callbacks.learning_rate import (
    multiply_learning_rates,
    note_rates,
    outstanding_factors,
    peak_rates,
    take_back_schedule,
)
from lightning_lamb.callbacks.plan_change import length_from, refuse_changed_plan, warm_up_again
from lightning_lamb.callbacks.position import Position
from lightning_lamb.callbacks.promise import Promise
from lightning_lamb.callbacks.scheduler_scaling import refuse_unscalable
from lightning_lamb.callbacks.step_clock import StepClock
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import PlanError
from lightning_lamb.lightning_data_seams import steps_before
from lightning_lamb.lightning_scheduler_seams import rate_finder
from lightning_lamb.lightning_seams import (
    Trainer,
    inner_optimizer,
    rank_zero_info,
    scheduler_configs,
    total_optimizer_steps,
)
from lightning_lamb.schedules import StagedWarmup
from lightning_lamb.staged_batches import StagedBatches

REMEDY = (
    "Remove what changes it, return it from configure_optimizers as the lr_scheduler, or describe the schedule to "
    "LargeBatch (warmup_steps, stages)."
)


class PromisedRates:
    """Scales, announces, restores and compares the learning rates of one ``fit``.

    Args:
        promise: told what differs.
    """

    def __init__(self, promise: Promise) -> None:
        self._promise = promise
        self.announced: tuple[float, ...] = ()
        """Peak learning rate of every group at the announcement. Groups that are added later are their maker's."""
        self.factor = 1.0
        self._schedulers: list[Any] = []
        self._optimizer: Optimizer | None = None
        self.adopted = False
        """Whether the training changed its plan at a checkpoint, so that its steps before had another batch."""
        self._fills_length = False
        self._adds_schedule = False
        self._in_checkpoint: tuple[tuple[float, ...], int] | None = None
        self._steps_before = 0

    # ---- before training

    def announce(
        self, trainer: Trainer, derived: DerivedBatch, rules: BatchRules, plan: StagedBatches | None, *, adopts: bool
    ) -> DerivedBatch:
        """Scales the fresh optimizer and completes its schedule.

        Args:
            trainer: after its optimizers were made, before a checkpoint is restored over them.
            derived: the batch.
            rules: give factor and warm-up.
            plan: the stages, whose schedule has the factors in it.
            adopts: a checkpoint with another schedule may be loaded.

        Returns:
            The numbers with rates, warm-up and length, as far as they had to be known.

        Raises:
            ConflictError: no optimizer, a scheduler that cannot be scaled, or a LearningRateFinder beside a scheduler.
        """
        stages = None if plan is None else plan.schedule()
        self._steps_before = steps_before(trainer)
        optimizers = [inner_optimizer(optimizer) for optimizer in trainer.optimizers]
        refuse_no_optimizer(trainer, optimizers, needed=stages is not None or rules.asks_about_rates)
        schedulers = schedule.schedulers_of(trainer)
        refuse_finder_beside_schedulers(trainer, schedulers)
        if not any(optimizer.param_groups for optimizer in optimizers):  # Lightning's stand-in for none
            return derived
        self.factor = 1.0 if stages is not None else rules.lr_factor(optimizers[0])
        for optimizer in optimizers:
            if not schedulers:
                take_back_schedule(optimizer)
            factors = outstanding_factors(optimizer, schedulers, self.factor)
            refuse_unscalable(schedulers, optimizer, factors)
            multiply_learning_rates(optimizer, schedulers, factors)
        self._fills_length = stages is None and schedule.needs_total(trainer, rules.asks_for_warmup)
        total, ramp = schedule.complete(trainer, rules, stages, adopts=adopts)
        self._optimizer, self._schedulers = optimizers[0], schedule.schedulers_of(trainer)
        self._adds_schedule = len(self._schedulers) > len(schedulers)
        self.note()
        self.announced = tuple(peak_rates(self._optimizer, self._schedulers))
        return dataclasses.replace(
            derived,
            learning_rates=self.announced,
            lr_factor=self.factor,
            warmup_steps=ramp,
            total_steps=total,
        )

    def note(self) -> None:
        """Remembers the optimizer's rates for the next ``fit`` with it; also called when training ends or fails."""
        if self._optimizer is not None:
            note_rates(self._optimizer, self._schedulers, self.factor, by_own_schedule=self._adds_schedule)

    # ---- a checkpoint

    def load(self, checkpoint: Mapping[str, Any], saved: Mapping[str, Any] | None, *, adopts: bool) -> None:
        """Notes what a checkpoint says, which is restored later.

        Args:
            checkpoint: the Trainer's.
            saved: LargeBatch's state in it, if any.
            adopts: this run follows another plan from there.
        """
        self.adopted = adopts or bool((saved or {}).get("adopted", False))
        self._in_checkpoint = tuple((saved or {}).get("learning_rates", ())), len(checkpoint.get("lr_schedulers", []))

    def differences(self) -> list[str]:
        """What differs between the announcement and the rates that a checkpoint restored, one line each."""
        if self._in_checkpoint is None or self._optimizer is None:
            return []
        found, schedulers = self._restored_rates(), self._in_checkpoint[1]
        lines = [
            f"learning rate of group {index}: {there:.6g} in the checkpoint, {here:.6g} now"
            + (f" ({here / self.factor:.6g} x {self.factor:.6g})" if self.factor != 1.0 else "")
            for index, (there, here) in enumerate(zip(found, self.announced))
            if not _close(there, here)
        ]
        if schedulers < len(self._schedulers):
            names = ", ".join(type(scheduler).__name__ for scheduler in self._schedulers[schedulers:])
            lines.append(f"schedule: no {names} in the checkpoint, one now")
        return lines

    def adopt(self, step: int) -> None:
        """Trains on with the announced rates instead of the restored ones.

        Args:
            step: optimizer steps done, at which a schedule goes on that the checkpoint knows nothing of.

        Raises:
            ConflictError: a scheduler that cannot be scaled.
            PlanError: a restored rate of 0, which nothing is a multiple of.
        """
        assert self._optimizer is not None
        assert self._in_checkpoint is not None
        found, schedulers = self._restored_rates(), self._in_checkpoint[1]
        if any(there == 0.0 != here for there, here in zip(found, self.announced)):
            raise PlanError(
                f"the checkpoint has learning rates {found}, and this run {self.announced}: a rate of 0 cannot be "
                "scaled. Train the weights alone (load_state_dict of the module) instead of resuming."
            )
        factors = [1.0 if there == here else here / there for there, here in zip(found, self.announced)]
        factors += [1.0] * (len(self._optimizer.param_groups) - len(factors))
        refuse_unscalable(self._schedulers, self._optimizer, factors)
        multiply_learning_rates(self._optimizer, self._schedulers, factors)
        for scheduler in self._schedulers[schedulers:]:
            if isinstance(scheduler, StagedWarmup):
                scheduler.continue_from(step, self.announced)

    def resume(
        self,
        trainer: Trainer,
        clock: StepClock,
        plan: StagedBatches | None,
        position: Position | None,
        rewarm: tuple[Literal["error", "adopt", "rewarm"], int | None, int | None],
    ) -> int | None:
        """Makes what a checkpoint restored train with the announced rates, or refuses it.

        Args:
            trainer: after the checkpoint was restored, or without one.
            clock: tells the steps that were really taken.
            plan: LargeBatch's stages.
            position: in the data, of a checkpoint that LargeBatch made.
            rewarm: LargeBatch's on_plan_change, at which optimizer step the rate warms up again, if at one already, and
                in how many steps.

        Returns:
            At which optimizer step the rate warms up again, if at one.

        Raises:
            PlanError: other rates, and ``on_plan_change="error"``.
            PromiseError: a schedule of another length than the training.
        """
        step, (on_plan_change, at, ramp) = clock.steps(trainer), rewarm
        if differences := self.differences():
            if on_plan_change == "error":
                refuse_changed_plan(differences, plan)
            self.adopt(step)
            at = step if on_plan_change == "rewarm" and at is None else at
        if at is None and (self.adopted or on_plan_change == "adopt") and self._fills_length:
            self._follow_length(trainer, self._length(trainer, plan, position))
        if at is not None:
            warm_up_again(trainer, at, self._length(trainer, plan, position), ramp)
        if not trainer.fast_dev_run and self._promise.check != "off":  # type: ignore[attr-defined]
            with contextlib.suppress(PlanError):  # without end: there is nothing to compare
                self._check_length(trainer, self._length(trainer, plan, position))
        return at

    @staticmethod
    def _follow_length(trainer: Trainer, length: int) -> None:
        """Gives the schedule the length of a training whose steps before had another batch."""
        staged = schedule.staged_warmup_of(trainer)
        if staged is not None and staged.total_steps != length:
            staged.set_total_steps(length)
            rank_zero_info(f"LargeBatch: {length} optimizer steps in all, with those before the plan changed.")

    def _length(self, trainer: Trainer, plan: StagedBatches | None, position: Position | None) -> int:
        """Optimizer steps of the training, by the stages, by what was trained with another batch before, or in all."""
        if plan is not None:
            return plan.total_steps
        if position is not None:
            return length_from(trainer, trainer.global_step, position)
        return total_optimizer_steps(trainer) - self._steps_before

    def _restored_rates(self) -> list[float]:
        """The peak rates that the checkpoint was trained with: as it says, or as they lie in the groups."""
        assert self._optimizer is not None
        assert self._in_checkpoint is not None
        saved = self._in_checkpoint[0]
        if self._schedulers and len(saved) == len(self.announced):
            return list(saved)
        return peak_rates(self._optimizer, self._schedulers)[: len(self.announced)]

    # ---- in training

    def _check_length(self, trainer: Trainer, total: int) -> None:
        """Compares the schedulers that know their length with the training's, before its first step.

        Args:
            trainer: after its data was loaded.
            total: optimizer steps of the training.
        """
        for config in scheduler_configs(trainer):
            length = getattr(config.scheduler, "total_steps", None)
            if not isinstance(config.scheduler, (OneCycleLR, StagedWarmup)) or length is None or config.frequency != 1:
                continue
            by_epoch = config.interval == "epoch" and not isinstance(config.scheduler, StagedWarmup)
            ticks = trainer.max_epochs if by_epoch and trainer.max_steps == -1 else None if by_epoch else total
            if ticks is None or ticks < 1:
                continue
            if isinstance(config.scheduler, StagedWarmup) and length < ticks:
                config.scheduler.tell_end(ticks)
                continue
            self._promise.compare(
                f"length of {type(config.scheduler).__name__} in {'epochs' if by_epoch else 'optimizer steps'}",
                ticks,
                length,
                "the total_steps it was made with, or a checkpoint of a longer or shorter training",
                (f"Take the {self._steps_before} steps of earlier fits off its length. " if self._steps_before else "")
                + "Give the scheduler the training's length (trainer.estimated_stepping_batches in "
                "configure_optimizers is right with LargeBatch; StagedWarmup finds it by itself), or the Trainer the "
                "schedule's (max_steps, max_epochs).",
            )

    def check(self, trainer: Trainer) -> None:
        """Compares the rates of this step with the announcement. Reads no tensor on a device after a first window."""
        if self._promise.check == "off" or self._optimizer is None:
            return
        groups = self._optimizer.param_groups[: len(self.announced)]
        found = [group["lr"] for group in groups]
        expected = [getattr(scheduler, "_last_lr", None) for scheduler in self._schedulers] or [list(self.announced)]
        if self._promise.is_first_window:
            if rate_finder(trainer) is None:
                self._check_peaks()
        elif any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in found):
            return
        if any(rates is None or _equal(found, rates) for rates in expected):
            return  # None: a scheduler that does not tell what it wrote
        if rate_finder(trainer) is not None:  # asked where something differs: it goes through all callbacks
            return
        for index, rate in enumerate(found):
            told = expected[-1] or []
            if index < len(told) and not _close(float(rate), float(told[index])):
                who = "a callback, the module's own code" + (", or another scheduler" if self._schedulers else "")
                self._promise.compare(
                    f"learning rate of group {index}",
                    float(told[index]),
                    float(rate),
                    f"{who}, or a checkpoint",
                    REMEDY,
                    where=f"at optimizer step {trainer.global_step}",
                )

    def _check_peaks(self) -> None:
        """Compares what the schedule is a multiple of."""
        assert self._optimizer is not None
        found = peak_rates(self._optimizer, self._schedulers)
        for scheduler in self._schedulers:
            if isinstance(scheduler, StagedWarmup):  # what it multiplies, whatever the groups say
                found = [float(rate) for rate in scheduler.base_lrs]
        if not self._schedulers or not all(hasattr(scheduler, "base_lrs") for scheduler in self._schedulers):
            return
        for index, (announced, rate) in enumerate(zip(self.announced, found)):
            if not _close(announced, rate):
                self._promise.compare(
                    f"peak learning rate of group {index}",
                    announced,
                    rate,
                    "a checkpoint, a LearningRateFinder or a scheduler that was made anew",
                    'Give LargeBatch on_plan_change="adopt" to train with what it announces, or remove the cause.',
                )


def _close(left: float, right: float) -> bool:
    """Equal, but for the rounding of a rate that is kept as a float32 tensor."""
    return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-30)


def _equal(found: Sequence[Any], rates: Sequence[Any]) -> bool:
    """Whether the first rates of a scheduler are those found."""
    return all(left is right or left == right for left, right in zip(found, rates))
