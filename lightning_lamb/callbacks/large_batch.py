"""`LargeBatch`: trains at a global batch, whatever the number of ranks and the memory of each."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.batch_stages import BatchStage
from lightning_lamb.callbacks import schedule, stage_switch
from lightning_lamb.callbacks.conflicts import (
    refuse_conflicts,
    refuse_double_clipping,
    refuse_finder,
    refuse_hybrid_resume,
    refuse_repeated_closures,
)
from lightning_lamb.callbacks.exact_resume import ExactResume
from lightning_lamb.callbacks.late_gradients import LateGradients
from lightning_lamb.callbacks.live_parameters import LiveParameters
from lightning_lamb.callbacks.plan_change import plan_differences, refuse_changed_plan
from lightning_lamb.callbacks.position import POSITION_KEY, Position, begin_stage_at, write_position
from lightning_lamb.callbacks.present_batch import PresentBatch
from lightning_lamb.callbacks.promise import Check, Promise
from lightning_lamb.callbacks.promised_rates import PromisedRates
from lightning_lamb.callbacks.promised_samples import PromisedSamples
from lightning_lamb.callbacks.state_names import name_optimizer_states
from lightning_lamb.callbacks.step_clock import StepClock
from lightning_lamb.callbacks.summary import DerivedBatch, describe, describe_batch, describe_stages, describe_windows
from lightning_lamb.callbacks.windows import WindowMean
from lightning_lamb.checks import one_of, whole_number
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.lightning_data_seams import after_setup
from lightning_lamb.lightning_seams import (
    Callback,
    LightningModule,
    Trainer,
    closes_window,
    drop_train_data_before_resume,
    end_epoch,
    inner_optimizer,
    is_deepspeed,
    limit_training,
    module_that_knows,
    rank_zero_info,
    strategy_accumulates,
)
from lightning_lamb.plan_options import PlanOptions
from lightning_lamb.sharding.annotate import annotate
from lightning_lamb.staged_batches import StagedBatches


class LargeBatch(Callback):
    """Trains at a global batch size: derives accumulation, learning rate and warm-up, and averages gradients exactly.

    Put it first in ``Trainer(callbacks=[...])`` and leave ``accumulate_grad_batches`` alone. It also makes the stock
    LightningCLI's schedulers step per optimizer step, fills in the length of a StagedWarmup (or adds one if a warm-up
    is asked for), and points an optimizer that was made before FSDP2 or tensor parallelism replaced the parameters at
    the new ones. What it
    derived is printed once and kept in ``derived``; in a training in stages ``plan`` holds them with their steps, and
    ``stage`` the index of the present one.

    Args:
        global_batch_size: Samples per optimizer step, over all ranks. Required, unless a recipe gives it.
        base_batch_size: Global batch that the learning rate and the warm-up fraction belong to. None: they belong to
            global_batch_size and are not scaled.
        base_lr: Learning rate at base_batch_size. None: the optimizer's own.
        warmup_fraction: Share of the training that is warm-up at base_batch_size; grows in proportion to the batch.
        warmup_steps: Warm-up in optimizer steps, instead of warmup_fraction.
        lr_scaling: How the learning rate follows the batch: "sqrt", "linear" or "none".
        micro_batch_size: Samples per forward pass and rank; with stages, or a recipe that has some, also a list of one
            per stage. It wins over what data modules say. None: read from data module or dataloader, after every setup.
        recipe: Name of a recipe (see `plan --help`) that gives what is left out above, but no sequence lengths.
        stages: A training in stages, instead of global_batch_size: a list of BatchStage or of dicts of its fields. The
            Trainer's max_steps is set to their total.
        doublings: How often the batch doubles during the training, from global_batch_size on, while the learning rate
            stays constant after the warm-up: stages that see equally many samples.
        total_samples: Samples of the whole training, for stages that give their share of them, and for doublings.
            None: from the Trainer's max_steps.
        exact_windows: Average over all samples (or reported counts) of a window, also when its micro-batches are uneven
            or the last window of an epoch is short. False: Lightning's mean of means.
        loss_reduction: What training_step returns: the "mean" over the samples (or the count given to
            lightning_lamb.callbacks.report_count), or their "sum".
        scheduler_interval: When schedulers step: after every optimizer "step" or "epoch". None: those that the stock
            LightningCLI made after every step, the others as configure_optimizers says. StagedWarmup: always "step".
        on_plan_change: When a checkpoint was made with another global batch, learning-rate rule or stages: "error",
            "adopt" to continue with this run's, or "rewarm" to do so after a warm-up from zero.
        rewarm_steps: Optimizer steps of that warm-up. None: as many as the schedule's own.
        exact_resume: Continue bit for bit from any checkpoint: the order of an ordinary DataLoader becomes a function
            of seed and epoch, and random numbers and position are saved. False: dataloaders and random numbers are left
            alone, and a resumed run begins the data of its epoch anew, unless the dataloader is stateful.
        log_window_loss: Log the mean loss over everything in a window, on all ranks, under this name. None: do not.
        check: What to do when a number that was announced is not the one that trains: "error", "warn" or "off".

    Raises:
        BatchSizeError: The global batch does not divide, the accumulation is longer than an epoch, or the micro-batch
            is unknown or contradicted by the data.
        RankDisagreementError: Ranks derived different numbers.
        PromiseError: What trains is not what was announced, with check="error".
        PlanError: The warm-up does not fit, the length of the training is unknown, or a checkpoint's plan differs.
        ConflictError: Something else sets the accumulation, clips gradients a second time, or owns the warm-up.
        InvalidOptionError: An option is out of range.
    """

    def __init__(
        self,
        global_batch_size: int | None = None,
        base_batch_size: int | None = None,
        base_lr: float | None = None,
        warmup_fraction: float = 0.0,
        warmup_steps: int | None = None,
        lr_scaling: Literal["sqrt", "linear", "none"] | None = None,
        micro_batch_size: int | list[int] | None = None,
        recipe: str | None = None,
        stages: list[BatchStage] | list[dict[str, Any]] | None = None,
        doublings: int = 0,
        total_samples: int | None = None,
        exact_windows: bool = True,
        loss_reduction: Literal["mean", "sum"] = "mean",
        scheduler_interval: Literal["step", "epoch"] | None = None,
        on_plan_change: Literal["error", "adopt", "rewarm"] = "error",
        rewarm_steps: int | None = None,
        exact_resume: bool = True,
        log_window_loss: str | None = "train_loss_window",
        check: Check = "error",
    ) -> None:
        super().__init__()
        given = (global_batch_size, base_batch_size, base_lr, warmup_fraction, warmup_steps, lr_scaling)
        self.stage_options = PlanOptions.of(*given, recipe, stages, doublings, total_samples, micro_batch_size)
        self.rules = BatchRules.of(*given, recipe) if self.stage_options is None else self.stage_options.rules
        one_size = micro_batch_size if self.stage_options is None else None
        micro = None if one_size is None else whole_number("micro_batch_size", one_size)
        settings = {"exact_windows": exact_windows, "loss_reduction": loss_reduction}
        self._batch = PresentBatch(self.rules, self.stage_options, micro, **settings)
        if rewarm_steps is not None and on_plan_change != "rewarm":
            raise InvalidOptionError(f'rewarm_steps={rewarm_steps} has no effect without on_plan_change="rewarm".')
        self.rewarm_steps = None if rewarm_steps is None else whole_number("rewarm_steps", rewarm_steps)
        self.exact_windows = exact_windows
        self.loss_reduction = one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        if scheduler_interval is not None:
            one_of("scheduler_interval", scheduler_interval, ("step", "epoch"))
        self.scheduler_interval = scheduler_interval
        self.on_plan_change = one_of("on_plan_change", on_plan_change, ("error", "adopt", "rewarm"))
        self._before: LiveParameters | None = None
        self._late: LateGradients | None = None
        self._window: WindowMean | None = None
        self.log_window_loss = log_window_loss
        self._forget_setup: Callable[[], None] = lambda: None
        self._resume = ExactResume(exact_resume)
        self._rewarm_at: int | None = None
        self._position: Position | None = None
        self._promise = Promise(check)
        self._rates, self._clock = PromisedRates(self._promise), StepClock()
        self._samples = PromisedSamples(self._promise)

    # ---- before the optimizers exist

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses conflicts and sets the accumulation, which strategies read when they are set up."""
        if stage != "fit":
            return
        refuse_conflicts(trainer, pl_module, self._batch.accumulation)
        refuse_finder(trainer, sets_rates=self._batch.stage_options is not None or self.rules.asks_about_rates)
        self._promise.begin()
        self._clock.forget()
        self._rates, self._clock = PromisedRates(self._promise), StepClock()
        self._batch.begin(trainer)
        self._rewarm_at, self._position, self._window, self._late = None, None, None, None
        self._before = LiveParameters(pl_module)
        self._forget_setup()
        self._forget_setup = after_setup(trainer, lambda: self._batch.derive(trainer, pl_module))

    @property
    def derived(self) -> DerivedBatch | None:
        """The numbers that train now; None before a ``fit`` was set up."""
        return self._batch.derived

    @property
    def plan(self) -> StagedBatches | None:
        """The stages with their steps, if there are stages."""
        return self._batch.plan

    @property
    def stage(self) -> int:
        """The index of the present stage."""
        return self._batch.stage

    # ---- stages

    def _enter_stage(self, trainer: Trainer, index: int) -> None:
        """Sets accumulation, data and counting of a stage."""
        self._batch.enter(trainer, index)
        self._promise.begin()
        if self._window is not None:
            self._window = self._window.of_next_stage(self._batch.batches[index].micro_batch_size)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the window's loss, and ends the epoch where a stage ends: the next one has data of its own."""
        if self._window is not None:
            self._window.publish(trainer, pl_module)
        self._clock.end_micro_batch(trainer, None if self.plan is None else self.plan.total_steps)
        if self.plan is not None and self.plan.at(self._clock.steps(trainer)) != self.stage:
            end_epoch(trainer)
        self._resume.end_micro_batch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enters the next stage where one ended."""
        if self.plan is None or self.plan.at(self._clock.steps(trainer)) == self.stage:
            return
        self._enter_stage(trainer, self.plan.at(self._clock.steps(trainer)))
        stage = self.plan.stages[self.stage]
        stage_switch.reload_data(trainer, stage)
        text = describe_batch(self._batch.batches[self.stage]) + "".join(f", {n}={v}" for n, v in stage.data.items())
        rank_zero_info(f"LargeBatch: step {self._clock.steps(trainer)}, stage {self.stage + 1}: {text}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks and takes over the data of an epoch that begins."""
        self._batch.check(trainer)
        self._samples.begin()
        self._resume.take_loaders(trainer)

    # ---- between the optimizers and the checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repairs, scales and schedules the fresh optimizer; a checkpoint is restored over it afterwards."""
        derived = self._batch.derive(trainer, pl_module)
        annotate(module_that_knows(trainer, pl_module))
        optimizers = [inner_optimizer(optimizer) for optimizer in trainer.optimizers]
        if self._before is not None and not is_deepspeed(trainer):
            rebound, self._before = self._before.rebind(optimizers, pl_module), None
            if rebound:
                rank_zero_info(f"LargeBatch: pointed the optimizer at {rebound} parameters that the strategy replaced.")
        refuse_double_clipping(trainer, optimizers)
        refuse_repeated_closures(optimizers)
        self._late = LateGradients.of(trainer)
        self._clock.follow(optimizers)

        schedule.set_interval(trainer, pl_module, self.scheduler_interval)
        self._batch.derived = derived = self._rates.announce(
            trainer, derived, self.rules, self.plan, adopts=self._follows_own_plan
        )
        if self.exact_windows and not strategy_accumulates(trainer):
            self._window = WindowMean(derived.micro_batch_size, self.loss_reduction, self.log_window_loss)
        self._print(trainer, derived)
        drop_train_data_before_resume(trainer)

    @property
    def _follows_own_plan(self) -> bool:
        """Whether the schedule in a checkpoint may be another one."""
        return self.on_plan_change != "error" or self._rewarm_at is not None or self._rates.adopted

    def _print(self, trainer: Trainer, derived: DerivedBatch) -> None:
        """The one summary."""
        texts = {
            "schedule": schedule.describe_schedules(trainer),
            "windows": describe_windows(None if self._window is None else self.loss_reduction),
        }
        if self.plan is not None:
            rank_zero_info(describe_stages(self._batch.batches, self.plan.table(), **texts))
        else:
            rank_zero_info(describe(derived, lr_rule=self.rules.describe_lr(), **texts))

    # ---- resuming

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Checks that the plan is still the same, and translates micro-batch counters to this run's accumulation.

        Strategies call it before or after the optimizers are made, so it touches none.
        """
        if not trainer.training:
            return
        refuse_hybrid_resume(trainer.strategy)
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        self._clock.skipped = int((saved or {}).get("skipped_steps", 0))
        step = int(checkpoint["global_step"]) - self._clock.skipped
        if self.plan is not None and self._clock.skipped:
            limit_training(trainer, self.plan.total_steps + self._clock.skipped)
        differences = [] if saved is None else plan_differences(self.rules, self.plan, saved)
        if self.on_plan_change == "error":
            refuse_changed_plan(differences, self.plan)
        derived = self._batch.derive(trainer, pl_module)
        if self.plan is not None and self.plan.at(step) != self.stage:
            self._enter_stage(trainer, self.plan.at(step))
            derived = self._batch.derive(trainer, pl_module)
        self._rates.load(checkpoint, saved, adopts=bool(differences))
        if saved is None:
            self._position = self._resume.load_foreign(trainer, checkpoint, rounds_down=self.on_plan_change != "error")
            return
        self._rewarm_at = saved["rewarm_at"] if not differences else step if self.on_plan_change == "rewarm" else None
        if self._follows_own_plan:
            schedule.permit_other_stages(trainer)
        where = checkpoint.get(POSITION_KEY, {})
        if where:
            position = Position(where["epoch"], where["micro_batches"])
            if self.plan is not None and step in self.plan.ends and self.stage > 0:
                position = begin_stage_at(checkpoint, where, position)
            both = [(one["accumulate_grad_batches"], one["global_batch_size"]) for one in (saved, vars(derived))]
            self._position = write_position(checkpoint, position, *both)
            self._resume.load(trainer, self._position, where, checkpoint)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds position and random numbers, of all ranks. In an open window, those of its start."""
        name_optimizer_states(trainer, pl_module, checkpoint)
        if self.derived is not None and "callbacks" in checkpoint:
            checkpoint[POSITION_KEY] = self._resume.save(trainer, checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts back what waits for the end of a setup, and what `teardown` does, which Lightning does not call then."""
        self._forget_setup()
        self._end_fit(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves Trainer and optimizer as another ``fit`` with them expects."""
        if stage == "fit":
            self._end_fit(trainer)

    def _end_fit(self, trainer: Trainer) -> None:
        """Notes the learning rates, and takes hooks and a longer length back."""
        self._rates.note()
        self._resume.stop()
        self._clock.stop(trainer, None if self.plan is None else self.plan.total_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the plan against the data that was loaded, before the first micro-batch."""
        self._batch.derive(trainer, pl_module)
        self._batch.check_all_ranks(trainer)
        self._samples.begin()
        self._clock.start(trainer)
        rewarm = self.on_plan_change, self._rewarm_at, self.rewarm_steps
        self._rewarm_at = self._rates.resume(trainer, self._clock, self.plan, self._position, rewarm)
        self._resume.start(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and dicts only, so that ``torch.load(weights_only=True)`` reads it."""
        if self.derived is None:
            return {}
        return {
            "rules": dataclasses.asdict(self.rules),
            "stages": None if self.plan is None else self.plan.to_list(),
            **dataclasses.asdict(self.derived),
            "learning_rates": list(self.derived.learning_rates),
            "rewarm_at": self._rewarm_at,
            "adopted": self._rates.adopted,
            "skipped_steps": self._clock.skipped,
        }

    # ---- one window

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restores training's random numbers, and notes the micro-batch, whose samples count."""
        self._resume.begin_micro_batch(trainer)
        if self._window is not None:
            self._window.expect(trainer, pl_module, batch, batch_idx)
        self._samples.begin_micro_batch(trainer, pl_module, self.derived, self._window, batch, batch_idx)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Begins a window where Lightning does."""
        if self._window is not None:
            self._window.begin()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Weighs the micro-batch."""
        if self._window is not None:
            self._window.weigh(trainer, pl_module, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Averages gradients that DDP leaves out, before a GradScaler looks at them."""
        if self._late is not None and closes_window(trainer):
            self._late.average()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compares the window with what was announced and normalises it, before the gradients are clipped."""
        self._samples.end_window(trainer, pl_module, self.derived)
        if self._window is not None:
            self._window.close(trainer, pl_module, optimizer)
        self._rates.check(trainer)
        self._promise.end_window()


def large_batch_of(trainer: Trainer) -> LargeBatch | None:
    """The LargeBatch callback of a Trainer, or None.

    Raises:
        ConflictError: there are several.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback for callback in callbacks if isinstance(callback, LargeBatch)]
    if len(found) > 1:
        raise ConflictError(
            f"the Trainer has {len(found)} LargeBatch callbacks, which all set the accumulation: keep one."
        )
    return found[0] if found else None
