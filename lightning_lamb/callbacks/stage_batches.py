"""What stages ask of a Trainer's data: the micro-batch of each, and the accumulation that follows."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from lightning_lamb.callbacks.micro_batch import told_micro_batch
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import BatchSizeError
from lightning_lamb.lightning_seams import Trainer, train_data_source
from lightning_lamb.plan_options import PlanOptions
from lightning_lamb.scaling import accumulate_grad_batches
from lightning_lamb.staged_batches import StagedBatches


class StageBatches:
    """The micro-batch of every stage.

    Args:
        options: what the user said about stages.
    """

    def __init__(self, options: PlanOptions) -> None:
        self._options = options
        self._told: tuple[Callable[[], Any], int] | None = None
        """Who makes the dataloader (a weak reference), and the micro-batch it told before a stage changed it."""

    def micro_batches(self, trainer: Trainer, *, make_loaders: bool) -> list[int] | None:
        """The micro-batch of every stage: as given, else as the data says.

        Args:
            trainer: after every ``setup``.
            make_loaders: make dataloaders if nothing else tells.

        Returns:
            None if they would tell and are not made.
        """
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
            size = told_micro_batch(trainer, make_loaders=make_loaders)
            if size is None:
                return None
            self._told = (weakref.ref(source) if hasattr(source, "train_dataloader") else lambda: None, size)
        told = self._told[1]
        return [told if size is None else size for size in given]


def share_out_stages(trainer: Trainer, plan: StagedBatches, sizes: list[int], ranks: int) -> list[DerivedBatch]:
    """Shares the batch of every stage out among ranks and accumulation.

    Args:
        trainer: after every ``setup``.
        plan: the stages with their steps.
        sizes: micro-batch of every stage.
        ranks: that see different samples.

    Raises:
        BatchSizeError: one does not divide, or the micro-batch cannot change; the message shows the plan.
    """
    _refuse_fixed_micro_batch(trainer, sizes)
    found = []
    for index, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True)):
        try:
            accumulation = accumulate_grad_batches(stage.global_batch_size, size, ranks)
        except BatchSizeError as error:
            raise BatchSizeError(f"stages[{index}]: {error}\n{plan.table()}") from None
        found.append(DerivedBatch(stage.global_batch_size, size, ranks, accumulation, total_steps=plan.total_steps))
    return found


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
