"""`StagedWarmup`: the learning rates of :mod:`lightning_lamb.stages` on an optimizer, stepped per optimizer step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lamb.checks import finite_number, one_of, whole_number
from lightning_lamb.errors import InvalidOptionError, PlanError, StateDictError
from lightning_lamb.scaling import warmup_steps as steps_of_fraction
from lightning_lamb.stages import (
    DecayFrom,
    Shape,
    Stage,
    as_stages,
    learning_rate,
    multiplier,
    plan_difference,
    total_steps_of,
)
from lightning_lamb.step_hooks import after_each_step

__all__ = ["Stage", "StagedWarmup", "multiplier"]


class StagedWarmup(LRScheduler):
    """Warm-up from zero, then decay; once, or again in every stage (re-warm-up).

    Call ``step()`` after every optimizer step (Lightning: ``interval="step"``). The learning rate is a pure function
    of the step, so a resumed run continues exactly. Works with several parameter groups (each keeps its own base
    learning rate), with groups added later, with tensor learning rates (filled in place), under ZeRO wrappers, and
    inside ``SequentialLR`` and ``ChainedScheduler``.

    Either give `stages`, or describe one stage by the other options. If the length of the training is not known yet,
    leave both `stages` and `total_steps` out: the learning rate is 0 until :meth:`set_total_steps` is called, which
    LambMixin, LargeBatch and LambCLI do.

    Args:
        optimizer: The optimizer, or a wrapper that holds it as `.optimizer`.
        stages: A list of stages, each with steps, warmup_steps, lr or scale, power, shape, decay_from, end.
        total_steps: Optimizer steps of the whole training (one stage). None: filled in later.
        warmup_steps: Optimizer steps of the ramp (one stage).
        warmup_fraction: The ramp as a share of the total steps, from 0 to 1, instead of warmup_steps.
        power: Exponent of the polynomial decay; 1 is linear, the paper's.
        shape: "poly", "cosine" (half a cosine) or "constant" (no decay).
        decay_from: "start": the decay counts from step 0, as the paper and BERT do; "peak": from the end of the ramp.
        on_plan_change: What to do when a checkpoint was made with other stages. "error": refuse and show the
            difference. "adopt": keep the step count and follow this run's stages from there.
        last_epoch: Optimizer steps already done, minus 1; -1 starts from the beginning.

    Raises:
        InvalidOptionError: An option is out of range, unknown, or given twice in two forms.
        PlanError: A warm-up is longer than its stage, or `step()` is called before the total is known.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.01)
        >>> scheduler = StagedWarmup(optimizer, [{"steps": 4, "warmup_steps": 2}, {"steps": 2, "lr": 0.005}])
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(round(scheduler.get_last_lr()[0], 6))
        ...     optimizer.step()
        ...     scheduler.step()
        >>> rates
        [0.005, 0.01, 0.005, 0.0025, 0.005, 0.0025]
    """

    _starting = False  # True within the step that a scheduler takes when it is made
    _told_end = False  # True once it was said that the schedule is over
    _optimizer_steps: int | None = None  # since the last step(); None where nobody counts

    def __init__(
        self,
        optimizer: Optimizer,
        stages: list[Stage] | list[dict[str, Any]] | None = None,
        *,
        total_steps: int | None = None,
        warmup_steps: int = 0,
        warmup_fraction: float | None = None,
        power: float = 1.0,
        shape: Shape = "poly",
        decay_from: DecayFrom = "start",
        on_plan_change: Literal["error", "adopt"] = "error",
        last_epoch: int = -1,
    ) -> None:
        single = _SingleStage(warmup_steps, warmup_fraction, power, shape, decay_from)
        one_of("on_plan_change", on_plan_change, ("error", "adopt"))
        if stages is not None and (total_steps is not None or single != _SingleStage()):
            raise InvalidOptionError(
                "stages and the options of a single stage (total_steps, warmup_steps, warmup_fraction, power, shape, "
                "decay_from) were both given. Put these values into the stages, or leave `stages` out."
            )
        self.single_stage = single
        self.on_plan_change = on_plan_change
        self._given_stages = stages is not None
        self.stages: tuple[Stage, ...] | None = None
        if stages is not None:
            self.stages = as_stages(stages)
        elif total_steps is not None:
            self.stages = single.of_length(total_steps)
        super().__init__(_innermost(optimizer), last_epoch)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of all stages together; None while unknown."""
        return None if self.stages is None else total_steps_of(self.stages)

    @property
    def is_unplanned(self) -> bool:
        """Whether nothing was said about the schedule yet: no stages, length, warm-up or decay."""
        return self.stages is None and self.single_stage == _SingleStage()

    def set_total_steps(self, total_steps: int) -> None:
        """Fill in the length of the training, and set the learning rates of the current step.

        Args:
            total_steps: Optimizer steps of the whole training.

        Raises:
            PlanError: The length is already known and differs (unless ``on_plan_change="adopt"``), it is not what the
                given stages add up to, or the warm-up is longer than it.
        """
        if self._given_stages:
            if self.total_steps != total_steps:
                raise PlanError(
                    f"The stages add up to {self.total_steps} optimizer steps, but the training has {total_steps}. "
                    "Change the stages, or the length of the training (max_steps)."
                )
            return
        planned = self.single_stage.of_length(total_steps)
        if planned == self.stages:
            return
        if self.stages is not None:
            self._check_same_plan(self.stages, planned, old_name="the scheduler", new_name="set_total_steps")
        self.stages = planned
        self._write_learning_rates()

    def set_stages(self, stages: list[Stage] | list[dict[str, Any]]) -> None:
        """Fill in the whole plan of a scheduler that was made without one, and set the current learning rates.

        Raises:
            PlanError: It has another plan already (unless ``on_plan_change="adopt"``); nothing is changed.
        """
        planned = as_stages(stages)
        if self.stages is not None and planned != self.stages:
            self._check_same_plan(self.stages, planned, old_name="the scheduler", new_name="set_stages")
        self.stages, self._given_stages = planned, True
        self._write_learning_rates()

    def continue_from(self, step: int, base_lrs: Sequence[float]) -> None:
        """Go on at an optimizer step, with these base learning rates, after a checkpoint that knew no schedule.

        Args:
            step: Optimizer steps done.
            base_lrs: One per group; later groups keep their own.
        """
        self.last_epoch, self._step_count = step, step + 1
        self.base_lrs = [*base_lrs, *self._base_lrs()[len(base_lrs) :]]
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group.setdefault("initial_lr", base_lr)
        self._write_learning_rates()

    def tell_end(self, training_steps: int | None = None) -> None:
        """Warn, once, that the schedule ends before the training does.

        Args:
            training_steps: Optimizer steps of the training, if known.
        """
        if self._told_end or self.stages is None:
            return
        self._told_end = True
        end = learning_rate(self.stages, self.total_steps or 0, 1.0, 1.0)
        longer = "goes on" if training_steps is None else f"makes {training_steps}"
        warnings.warn(
            f"StagedWarmup ends after {self.total_steps} optimizer steps, and the training {longer}: from there on the "
            f"learning rate stays at {end:g} x the optimizer's. Give the schedule the training's length (leave "
            "total_steps out under LambMixin, LargeBatch or LambCLI), or end the training there (max_steps).",
            stacklevel=3,
        )

    def get_lr(self) -> list[Any]:
        """Return the learning rate of every parameter group at the current step; no communication, no device sync."""
        if self.stages is None:
            if not self._starting:
                raise PlanError(
                    "total_steps=None: StagedWarmup was stepped before it knew the length of the training. Give "
                    "total_steps or stages, or call set_total_steps(n) first (LambMixin, LargeBatch and LambCLI do)."
                )
            return [0.0 for _ in self.optimizer.param_groups]
        base_lrs = self._base_lrs()
        step = max(self.last_epoch, 0)
        return [learning_rate(self.stages, step, base_lr, base_lrs[0]) for base_lr in base_lrs]

    def follow_optimizer(self) -> None:
        """From now on let ``step()`` count only if the optimizer made a step since the last call.

        A GradScaler skips the optimizer where gradients overflowed, and Lightning steps its schedulers all the same.
        LambMixin, LargeBatch and LambCLI call this. No communication: under a GradScaler all ranks skip together.
        Without effect on an optimizer whose steps torch does not report (see `step_hooks.after_each_step`).
        """
        if self._optimizer_steps is None and after_each_step(self.optimizer, self._count_optimizer_step):
            self._optimizer_steps = 0

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next optimizer step's learning rate; see `follow_optimizer`."""
        if self._optimizer_steps == 0 and epoch is None:
            return
        if self._optimizer_steps is not None:
            self._optimizer_steps = 0
        if self.total_steps is not None and self.last_epoch >= self.total_steps:
            self.tell_end()
        super().step(epoch) if epoch is not None else super().step()

    def _count_optimizer_step(self, optimizer: Any) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # with fused=True the scaler calls step() all the same
            return
        self._optimizer_steps = (self._optimizer_steps or 0) + 1

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts only, so that ``torch.load(weights_only=True)`` reads it."""
        stages = None if self.stages is None else [dataclasses.asdict(stage) for stage in self.stages]
        return {
            "stages": stages,
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "_last_lr": [float(lr) for lr in self._last_lr],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a checkpoint's step. Load the optimizer first, as it restores the learning rates.

        Raises:
            StateDictError: The state belongs to another scheduler class.
            PlanError: The checkpoint was made with other stages; the message shows the difference, and nothing is
                changed. ``on_plan_change="adopt"`` continues with this run's stages instead.
        """
        missing = [key for key in self.state_dict() if key not in state_dict]
        if missing:
            raise StateDictError(
                f"This is no state of StagedWarmup: it has no {', '.join(missing)}. It was saved by another scheduler; "
                "resume with that one, or start a new scheduler with last_epoch set to the steps done."
            )
        saved = None if state_dict["stages"] is None else as_stages(state_dict["stages"])
        changed = saved is not None and self.stages is not None and saved != self.stages
        if changed:
            self._check_same_plan(saved or (), self.stages or (), old_name="the checkpoint", new_name="this run")
        owned = self._wrote_current_rates(state_dict["_last_lr"])
        self.stages = self.stages or saved
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._last_lr = list(state_dict["_last_lr"])
        if changed and owned:
            self._write_learning_rates()

    def _initial_step(self) -> None:
        # torch takes a first step in the constructor (and SequentialLR another): the only ones allowed without a plan.
        self._starting = True
        try:
            super()._initial_step()
        finally:
            self._starting = False

    def _base_lrs(self) -> list[float]:
        """Return one base rate per group, as floats: a tensor is read once, not in every step."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            # A group that was added after the scheduler was made: its own rate is its base.
            group.setdefault("initial_lr", float(group["lr"]))
            self.base_lrs.append(group["initial_lr"])
        base_lrs = [float(lr) for lr in self.base_lrs]
        self.base_lrs = list(base_lrs)
        return base_lrs[: len(self.optimizer.param_groups)]

    def _write_learning_rates(self) -> None:
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], (float, int)):
                group["lr"] = rate
            else:  # a tensor, which a compiled or captured step may hold on to
                group["lr"].fill_(rate)
        self._last_lr = list(rates)

    def _wrote_current_rates(self, saved_rates: Sequence[float]) -> bool:
        """Say whether the optimizer's rates are this scheduler's, not those of a sibling inside SequentialLR."""
        current = [float(group["lr"]) for group in self.optimizer.param_groups]
        ours = ([float(lr) for lr in self._last_lr], list(saved_rates))
        # 1e-6: a float32 tensor holds the rate rounded.
        return any(
            len(rates) == len(current)
            and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(rates, current, strict=True))
            for rates in ours
        )

    def _check_same_plan(self, old: Sequence[Stage], new: Sequence[Stage], *, old_name: str, new_name: str) -> None:
        if self.on_plan_change == "adopt":
            return
        difference = plan_difference(old, new, old_name=old_name, new_name=new_name)
        again = "Make the two equal again"
        if not self._given_stages and len(old) == len(new) == 1:  # this user never wrote a stage
            difference = difference.replace("stages[0].steps:", "total_steps:").replace("stages[0].", "")
            again += " (total_steps is the training's length: max_steps, or max_epochs, the data and the batch)"
        raise PlanError(
            f"The learning-rate plan changed; nothing was loaded or overwritten:\n{difference}\n{again}, or pass "
            'on_plan_change="adopt" (to StagedWarmup, lamb_schedule or LargeBatch) to keep the step count and follow '
            "the new plan from there."
        )


@dataclasses.dataclass(frozen=True)
class _SingleStage:
    """The options of a single stage whose length may not be known yet."""

    warmup_steps: int = 0
    warmup_fraction: float | None = None
    power: float = 1.0
    shape: Shape = "poly"
    decay_from: DecayFrom = "start"

    def __post_init__(self) -> None:
        ramp = whole_number("warmup_steps", self.warmup_steps, at_least=0)
        if self.warmup_fraction is not None:
            finite_number("warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0)
            if ramp:
                raise InvalidOptionError(
                    f"warmup_steps={ramp} and warmup_fraction={self.warmup_fraction} both set the warm-up. Give one."
                )
        # The length does not matter for these checks, as long as the ramp fits.
        Stage(max(ramp, 1), ramp, power=self.power, shape=self.shape, decay_from=self.decay_from)

    def of_length(self, total_steps: int) -> tuple[Stage, ...]:
        """The stage, for a training of so many optimizer steps.

        Raises:
            InvalidOptionError: ``total_steps`` is no whole number above 0.
            PlanError: the warm-up is longer.
        """
        total = whole_number("total_steps", total_steps)
        ramp = self.warmup_steps
        if self.warmup_fraction is not None:
            ramp = steps_of_fraction(self.warmup_fraction, total)
        elif ramp > total:
            raise PlanError(
                f"warmup_steps={ramp} is above total_steps={total}. Shorten the warm-up or train for more steps."
            )
        return (Stage(total, ramp, power=self.power, shape=self.shape, decay_from=self.decay_from),)


def _innermost(optimizer: Any) -> Any:
    # DeepSpeed hands schedulers its ZeRO wrapper, which torch refuses as "not an Optimizer".
    while not isinstance(optimizer, Optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
