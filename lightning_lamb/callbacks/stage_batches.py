"""What stages ask of a Trainer's data: the micro-batch of each, and the accumulation that follows."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from lightning_lamb.callbacks.micro_batch import declared_micro_batch, micro_batch_of_loaders
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import BatchSizeError
from lightning_lamb.lightning_seams import Trainer, train_data_source
from lightning_lamb.plan_options import PlanOptions
from lightning_lamb.scaling import accumulate_grad_batches
from lightning_lamb.staged_batches import StagedBatches


class StageBatches:
    """Shares the batch of every stage out among ranks and accumulation.

    Args:
        options: what the user said about stages.
    """

    def __init__(self, options: PlanOptions) -> None:
        self._options = options
        self._told: tuple[Callable[[], Any], int] | None = None
        """Who makes the dataloader (a weak reference), and the micro-batch it told before a stage changed it."""

    def derive(self, trainer: Trainer, plan: StagedBatches, ranks: int) -> list[DerivedBatch]:
        """The batch of every stage.

        Args:
            trainer: after every ``setup``; its dataloader is made if nothing else tells the micro-batch.
            plan: the stages with their steps.
            ranks: that see different samples.

        Raises:
            BatchSizeError: one does not divide, or the micro-batch cannot change; the message shows the plan.
        """
        sizes = self._micro_batches(trainer)
        _refuse_fixed_micro_batch(trainer, sizes)
        found = []
        for index, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True)):
            try:
                accumulation = accumulate_grad_batches(stage.global_batch_size, size, ranks)
            except BatchSizeError as error:
                raise BatchSizeError(f"stages[{index}]: {error}\n{plan.table()}") from None
            found.append(DerivedBatch(stage.global_batch_size, size, ranks, accumulation, total_steps=plan.total_steps))
        return found

    def _micro_batches(self, trainer: Trainer) -> list[int]:
        """The micro-batch of every stage: as given, else as the data says."""
        number = len(self._options.stages)
        if self._options.micro_batch_sizes:
            sizes = list(self._options.micro_batch_sizes)
            return sizes if len(sizes) > 1 else sizes * number
        given = [stage.micro_batch_size for stage in self._options.stages]
        if all(size is not None for size in given):
            return [size for size in given if size is not None]
        source = train_data_source(trainer)
        # Where stages write the data module's batch_size, a second fit would find what the last stage set.
        if self._told is None or self._told[0]() is not source or not any(given):
            size = declared_micro_batch(trainer) or micro_batch_of_loaders(trainer)
            self._told = (weakref.ref(source) if hasattr(source, "train_dataloader") else lambda: None, size)
        told = self._told[1]
        return [told if size is None else size for size in given]


def _refuse_fixed_micro_batch(trainer: Trainer, sizes: list[int]) -> None:
    """Refuses micro-batches that differ between the stages where nothing can change them."""
    source = train_data_source(trainer)
    if len(set(sizes)) == 1:
        return
    if not hasattr(source, "train_dataloader"):
        raise BatchSizeError(
            f"the stages have micro-batches of {sizes}, but fit was given a {type(source).__name__}, whose batch size "
            "cannot change. Give fit a LightningDataModule that reads self.batch_size in train_dataloader, or use one "
            "micro-batch size."
        )
    if not (hasattr(source, "batch_size") or "batch_size" in getattr(source, "hparams", {})):
        raise BatchSizeError(
            f"the stages have micro-batches of {sizes}, but {type(source).__name__} has no batch_size that could be "
            "set. Read self.batch_size in train_dataloader, or use one micro-batch size."
        )
