"""Where a training is, in epochs and micro-batches, and how a checkpoint says so.

Positions are window starts: what was accumulated in an open window is not in a checkpoint, so a run that continues from
inside one computes it again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_lamb.errors import PlanError
from lightning_lamb.lightning_resume_seams import loop_counters
from lightning_lamb.lightning_seams import Trainer

POSITION_KEY = "lightning_lamb_position"
"""Where a checkpoint holds the position in the data and the random numbers."""


@dataclasses.dataclass(frozen=True)
class Position:
    """The start of a window.

    Attributes:
        epoch: from 0.
        micro_batches: of this epoch that were trained on, per rank; 0: the epoch begins.
    """

    epoch: int
    micro_batches: int


def present_position(trainer: Trainer, *, has_stepped: bool = False) -> tuple[Position, bool]:
    """The start of the window that training is in or before.

    An epoch that ``max_steps`` or a callback cut short has not ended: a longer training would go on in it.

    Args:
        trainer: at any moment of a ``fit``, or after it.
        has_stepped: the optimizer has taken the step of the present micro-batch, which Lightning may not have counted.

    Returns:
        The position, and whether it is where training is: no micro-batch of the next window has begun.
    """
    epoch, batch = loop_counters(trainer)
    done = batch.current.processed
    start = done - done % trainer.accumulate_grad_batches
    if epoch.processed == epoch.ready:  # between two epochs, or before the first
        if epoch.processed and done and not batch.is_last_batch:
            return Position(epoch.processed - 1, start), start == done
        return Position(epoch.processed, 0), True
    at_batch_end = batch.current.ready == done
    if has_stepped and not at_batch_end:
        is_last = batch.is_last_batch or batch.current.ready == trainer.num_training_batches
        return Position(epoch.processed + is_last, 0 if is_last else batch.current.ready), True
    if at_batch_end and batch.is_last_batch:
        return Position(epoch.processed + 1, 0), True
    return Position(epoch.processed, start), at_batch_end and start == done


def has_uncounted_micro_batch(trainer: Trainer) -> bool:
    """Whether a micro-batch has begun and Lightning has not counted it yet."""
    _, batch = loop_counters(trainer)
    return bool(batch.current.ready != batch.current.processed)


def count_micro_batch(checkpoint: dict[str, Any]) -> None:
    """Counts, in a checkpoint, the micro-batch whose optimizer step was taken before Lightning counted either.

    Args:
        checkpoint: its counters and ``global_step`` are modified in place.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches = loops["epoch_loop.batch_progress"]
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    checkpoint["global_step"] += steps["total"]["ready"] - steps["total"]["completed"]
    for part in ("total", "current"):
        batches[part]["processed"] = batches[part]["ready"]
        steps[part]["completed"] = steps[part]["ready"]


def position_of_foreign(checkpoint: dict[str, Any], accumulation: int, *, rounds_down: bool) -> Position | None:
    """Where in an epoch a run without LargeBatch was.

    Args:
        checkpoint: of that run. It does not tell its micro-batch, nor its ranks.
        accumulation: of this run.
        rounds_down: go back to the start of the window, rather than refuse.

    Returns:
        None: between two epochs, where there is nothing to translate.

    Raises:
        PlanError: no window of this run begins there.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    done, has_ended = batches["current"]["processed"], epochs["processed"] == epochs["ready"]
    if done == 0 or batches["is_last_batch"]:
        return None
    epoch, start = epochs["processed"] - has_ended, done - done % accumulation
    if start != done and not rounds_down:
        raise PlanError(
            f"the checkpoint is of a run without LargeBatch, saved after {done} micro-batches of epoch {epoch}, where "
            f"no window of accumulate_grad_batches={accumulation} begins: the epoch's data would not be what is left "
            'of it. Continue from a checkpoint of the end of an epoch, or with on_plan_change="adopt", which goes back '
            f"to micro-batch {start} and trains on {done - start} micro-batches a second time."
        )
    return Position(epoch, start)


def begin_stage_at(checkpoint: dict[str, Any], where: dict[str, Any], position: Position) -> Position:
    """The position of a checkpoint from where a stage ended: it begins an epoch, with new dataloaders."""
    checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
    where.pop("loader_states", None)
    return Position(position.epoch + 1, 0) if position.micro_batches else position


def write_position(
    checkpoint: dict[str, Any], position: Position, saved_batch: tuple[int, int], batch: tuple[int, int]
) -> Position:
    """Rewrites the progress in a checkpoint so that Lightning continues at a position.

    The counters become those of a checkpoint saved at the end of the micro-batch before, or, at the start of an epoch,
    those of a training that finished the epochs before. After 12 micro-batches at accumulation 4 and on half the ranks,
    accumulation 8, Lightning must believe that it has seen 24. With another global batch it continues at the last start
    of a window that it has the samples for: less than one window's samples come again in this epoch, none is left out.

    Args:
        checkpoint: ``loops.fit_loop`` in it is modified in place.
        position: in micro-batches of the run that saved it.
        saved_batch: accumulation and global batch of that run, at that position.
        batch: those of this run.

    Returns:
        The position in this run's micro-batches.
    """
    loops = checkpoint["loops"]["fit_loop"]
    (saved_accumulation, saved_global), (accumulation, global_batch) = saved_batch, batch
    seen = position.micro_batches * saved_global // (saved_accumulation * global_batch)  # windows of this run
    current = seen * accumulation
    begun = 1 if current else 0
    epochs = loops["epoch_progress"]
    in_first_window = (
        not position.micro_batches and epochs["current"]["ready"] > epochs["current"]["processed"] == position.epoch
    )
    earlier = epochs["total"]["processed"] - epochs["current"]["processed"]  # of fits before
    for part, count in (("total", earlier + position.epoch), ("current", position.epoch)):
        epochs[part].update(ready=count + begun, started=count + begun, processed=count, completed=count)

    batches = loops["epoch_loop.batch_progress"]
    in_epoch = bool(position.micro_batches) or in_first_window
    earlier_micro_batches = batches["total"]["processed"] - in_epoch * batches["current"]["processed"]
    total = current + earlier_micro_batches * accumulation * saved_global // (saved_accumulation * global_batch)
    for part, count in (("total", total), ("current", current)):
        batches[part].update(ready=count, started=count, processed=count, completed=count - begun)
    batches["is_last_batch"] = False

    validation = loops.get("epoch_loop.val_loop.batch_progress", {})
    for part in ("total", "current"):
        validation.get(part, {}).update(ready=0, started=0, processed=0, completed=0)
    return Position(position.epoch, current)
