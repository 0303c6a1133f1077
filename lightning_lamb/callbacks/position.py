"""Where a training is, in epochs and micro-batches, and how a checkpoint says so.

Positions are window starts: what was accumulated in an open window is not in a checkpoint, so a run that continues from
inside one computes it again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_lamb.lightning_resume_seams import loop_counters
from lightning_lamb.lightning_seams import Trainer


@dataclasses.dataclass(frozen=True)
class Position:
    """The start of a window.

    Attributes:
        epoch: from 0.
        micro_batches: of this epoch that were trained on, per rank; 0: the epoch begins.
    """

    epoch: int
    micro_batches: int


def present_position(trainer: Trainer) -> tuple[Position, bool]:
    """The start of the window that training is in or before.

    Returns:
        The position, and whether it is where training is: no micro-batch of the next window has begun.
    """
    epoch, batch = loop_counters(trainer)
    done = batch.current.processed
    if epoch.processed == epoch.ready:  # between two epochs, or before the first
        return Position(epoch.processed, 0), True
    at_batch_end = batch.current.ready == done
    if at_batch_end and batch.is_last_batch:
        return Position(epoch.processed + 1, 0), True
    start = done - done % trainer.accumulate_grad_batches
    return Position(epoch.processed, start), at_batch_end and start == done


def write_position(
    checkpoint: dict[str, Any], position: Position, saved_accumulation: int, accumulation: int
) -> Position:
    """Rewrites the progress in a checkpoint so that Lightning continues at a position.

    The counters become those of a checkpoint saved at the end of the micro-batch before, or, at the start of an epoch,
    those of a training that finished the epochs before. After 12 micro-batches at accumulation 4 and on half the ranks,
    accumulation 8, Lightning must believe that it has seen 24.

    Args:
        checkpoint: ``loops.fit_loop`` in it is modified in place.
        position: in micro-batches of the run that saved it.
        saved_accumulation: of that run, at that position.
        accumulation: of this run.

    Returns:
        The position in this run's micro-batches.
    """
    loops = checkpoint["loops"]["fit_loop"]
    begun = 1 if position.micro_batches else 0
    epochs = loops["epoch_progress"]
    in_first_window = not begun and epochs["current"]["ready"] > epochs["current"]["processed"] == position.epoch
    earlier = epochs["total"]["processed"] - epochs["current"]["processed"]  # of fits before
    for part, count in (("total", earlier + position.epoch), ("current", position.epoch)):
        epochs[part].update(ready=count + begun, started=count + begun, processed=count, completed=count)

    batches = loops["epoch_loop.batch_progress"]
    rewound = batches["current"]["processed"] - position.micro_batches if begun or in_first_window else 0
    total = (batches["total"]["processed"] - rewound) * accumulation // saved_accumulation
    current = position.micro_batches * accumulation // saved_accumulation
    for part, count in (("total", total), ("current", current)):
        batches[part].update(ready=count, started=count, processed=count, completed=count - begun)
    batches["is_last_batch"] = False

    validation = loops.get("epoch_loop.val_loop.batch_progress", {})
    for part in ("total", "current"):
        validation.get(part, {}).update(ready=0, started=0, processed=0, completed=0)
    return Position(position.epoch, current)
