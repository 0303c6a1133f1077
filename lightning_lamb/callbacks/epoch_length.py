"""An optimizer step needs so many micro-batches, and an epoch has so many: a window that is longer is refused early."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_lamb.callbacks.micro_batch import loader_batch_size
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import BatchSizeError
from lightning_lamb.lightning_data_seams import loaders_in_sight
from lightning_lamb.lightning_seams import Trainer
from lightning_lamb.staged_batches import StagedBatches


def refuse_short_epoch(batches: float, derived: DerivedBatch) -> None:
    """Compares a window with the epoch.

    Args:
        batches: micro-batches per epoch and rank.
        derived: the batch that was planned.

    Raises:
        BatchSizeError: the window is longer.
    """
    if batches < derived.accumulate_grad_batches:
        largest = int(batches) * derived.micro_batch_size * derived.data_parallel_size
        raise BatchSizeError(
            f"global_batch_size={derived.global_batch_size} needs {derived.accumulate_grad_batches} micro-batches per "
            f"optimizer step, but an epoch has {batches} per rank: a step would end with the epoch, on fewer samples. "
            f"Use a global batch of at most {largest}, or more data per epoch (limit_train_batches cuts it too)."
        )


def refuse_short_later_stages(
    trainer: Trainer, plan: StagedBatches, batches: Sequence[DerivedBatch], present: int
) -> None:
    """Compares the windows of later stages with their epochs, as far as the present dataloader tells their length.

    Stages with ``data`` of their own may have another dataset: they are looked at when they begin.

    Args:
        trainer: its dataloaders were made.
        plan: the stages.
        batches: of every stage.
        present: the stage that begins.

    Raises:
        BatchSizeError: a later stage's window is certainly longer than its epoch; the message shows the plan.
    """
    loaders = loaders_in_sight(trainer) or []
    try:
        (length,) = (len(loader) for loader in loaders)
        (micro,) = (loader_batch_size(loader) for loader in loaders)
    except (TypeError, ValueError):  # several, or none that knows
        return
    if micro is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    limit = trainer.limit_train_batches
    for index in range(present + 1, len(batches)):
        if plan.stages[index].data != plan.stages[present].data:
            continue
        found = math.ceil(length * micro / batches[index].micro_batch_size)  # rather too many than too few
        found = min(found, limit) if isinstance(limit, int) else int(found * limit)
        try:
            refuse_short_epoch(found, batches[index])
        except BatchSizeError as error:
            raise BatchSizeError(f"stages[{index}]: {error}\n{plan.table()}") from None
