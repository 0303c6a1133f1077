"""The batch that trains at present: derived once per ``fit``, after every ``setup``, and another one in each stage."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.callbacks import stage_switch
from lightning_lamb.callbacks.epoch_length import refuse_short_epoch, refuse_short_later_stages
from lightning_lamb.callbacks.micro_batch import (
    declared_micro_batch,
    refuse_changed_loader,
    refuse_other_micro_batch,
    told_micro_batch,
)
from lightning_lamb.callbacks.rank_agreement import same_on_every_rank
from lightning_lamb.callbacks.stage_batches import StageBatches, share_out_stages
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import LightningLambError
from lightning_lamb.lightning_seams import LightningModule, Trainer, data_parallel_size, drop_data, train_data_source
from lightning_lamb.plan_options import PlanOptions
from lightning_lamb.scaling import accumulate_grad_batches
from lightning_lamb.staged_batches import StagedBatches


class PresentBatch:
    """What one ``fit`` trains with, and which stage it is in.

    Args:
        rules: of a training with one batch.
        stage_options: of a training in stages, or None.
        micro_batch_size: as the user gave it, for a training with one batch.
        **settings: what else must be the same on every rank.
    """

    def __init__(
        self, rules: BatchRules, stage_options: PlanOptions | None, micro_batch_size: int | None, **settings: Any
    ) -> None:
        self.rules = rules
        self._settings = settings
        self.stage_options = stage_options
        self._stage_batches = None if stage_options is None else StageBatches(stage_options)
        self.micro_batch_size = micro_batch_size
        self.derived: DerivedBatch | None = None
        self.plan: StagedBatches | None = None
        self.batches: list[DerivedBatch] = []
        """One per stage."""
        self.stage = 0
        self.accumulation: int | None = None
        """What this object set last, in any ``fit``."""
        self._is_checked = False

    def begin(self, trainer: Trainer) -> None:
        """Forgets an earlier ``fit``, and makes the Trainer train as long as the stages.

        Sets the accumulation as far as it is known already, for whoever asks before everything is set up.
        """
        self.derived, self.plan, self.batches, self.stage = None, None, [], 0
        self._is_checked = False
        self._accumulate(trainer, 1)
        if self.stage_options is not None:
            self.plan = self.stage_options.plan(None if trainer.max_steps == -1 else trainer.max_steps)
            stage_switch.fit_length(trainer, self.plan)
            return
        micro = self.micro_batch_size
        if micro is None and trainer.datamodule is not None:  # type: ignore[attr-defined]
            with contextlib.suppress(LightningLambError):  # raised later, where no rank is left waiting
                micro = declared_micro_batch(trainer)
        step = self.rules.global_batch_size
        if micro and step % (micro * data_parallel_size(trainer)) == 0:
            self._accumulate(trainer, step // (micro * data_parallel_size(trainer)))

    def derive(self, trainer: Trainer, module: LightningModule) -> DerivedBatch:
        """Derives the accumulation, once per ``fit``, after every ``setup``.

        Makes the dataloader if nothing else tells the micro-batch.

        Raises:
            BatchSizeError: the global batch does not divide, or the micro-batch is unknown or contradicted.
        """
        if self.derived is not None:
            return self.derived
        if self.plan is not None:
            stage_switch.refuse_impossible_data(trainer, module, self.plan)
        sizes = self._micro_batches(trainer)
        ranks = data_parallel_size(trainer)
        if self.plan is not None:
            self.batches = share_out_stages(trainer, self.plan, sizes, ranks)
            self.enter(trainer, 0)
            if hasattr(train_data_source(trainer), "train_dataloader"):
                drop_data(trainer, validation=False)  # made to be asked, if at all, without the first stage's data
            assert self.derived is not None
            return self.derived
        steps = accumulate_grad_batches(self.rules.global_batch_size, sizes[0], ranks)
        self._accumulate(trainer, steps)
        self.derived = DerivedBatch(self.rules.global_batch_size, sizes[0], ranks, steps)
        return self.derived

    def _micro_batches(self, trainer: Trainer) -> list[int]:
        """The micro-batch of every stage (of one, without stages), the same on every rank."""
        settings = {**self._settings, **dataclasses.asdict(self.rules)}
        settings["stages"] = None if self.plan is None else self.plan.to_list()

        def told(*, make_loaders: bool) -> dict[str, Any]:
            return {"micro_batch_size": self._told(trainer, make_loaders=make_loaders), **settings}

        sizes = same_on_every_rank(trainer, lambda: told(make_loaders=False))["micro_batch_size"]
        if sizes is None:  # on every rank, so that all of them make their dataloaders now
            sizes = same_on_every_rank(trainer, lambda: told(make_loaders=True))["micro_batch_size"]
        return list(sizes)

    def _told(self, trainer: Trainer, *, make_loaders: bool) -> list[int] | None:
        """What user and data say of the micro-batches; None if only dataloaders can tell, which are not made yet."""
        if self._stage_batches is not None:
            return self._stage_batches.micro_batches(trainer, make_loaders=make_loaders)
        micro = self.micro_batch_size or told_micro_batch(trainer, make_loaders=make_loaders)
        if micro is not None:
            refuse_other_micro_batch(trainer, micro, self._told_by(trainer))
        return None if micro is None else [micro]

    def enter(self, trainer: Trainer, index: int) -> None:
        """Sets accumulation and data of a stage. The learning rate is the schedule's, a function of the step."""
        assert self.plan is not None
        batch = self.batches[index]
        rates = () if self.derived is None else self.derived.learning_rates
        self._is_checked = False
        self.stage, self.derived = index, dataclasses.replace(batch, learning_rates=rates)
        self._accumulate(trainer, batch.accumulate_grad_batches)
        stage_switch.apply_stage(trainer, self.plan.stages[index], batch.micro_batch_size)

    def check_all_ranks(self, trainer: Trainer) -> None:
        """Compares the dataloaders that were made, and the epochs of all ranks, before the first micro-batch.

        Raises:
            BatchSizeError: they give other batches than planned, or ranks have epochs of different lengths.
        """

        def epoch() -> dict[str, Any]:
            self.check(trainer)
            return {"the micro-batches of an epoch": trainer.num_training_batches}

        same_on_every_rank(trainer, epoch)

    def check(self, trainer: Trainer) -> None:
        """Compares the dataloaders that were made, before the first micro-batch of a stage and of an epoch.

        Raises:
            BatchSizeError: they give other batches than planned, or an epoch is shorter than a window.
        """
        assert self.derived is not None
        micro = self.derived.micro_batch_size
        if self._is_checked:
            refuse_changed_loader(trainer, micro)
        else:
            refuse_other_micro_batch(trainer, micro, self._told_by(trainer))
            self._is_checked = True
            if self.plan is not None:
                refuse_short_later_stages(trainer, self.plan, self.batches, self.stage)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            refuse_short_epoch(trainer.num_training_batches, self.derived)

    def _accumulate(self, trainer: Trainer, micro_batches: int) -> None:
        trainer.accumulate_grad_batches = self.accumulation = micro_batches

    def _told_by(self, trainer: Trainer) -> str:
        """Where the micro-batch is from, for a message."""
        source: Any = train_data_source(trainer)
        if self.stage_options is not None:
            return f"of stages[{self.stage}]"
        if self.micro_batch_size is not None:
            return "given to LargeBatch"
        return f"{type(source).__name__}.batch_size"
