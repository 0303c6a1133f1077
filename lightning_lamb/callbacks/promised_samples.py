"""The accumulation of every window, and the samples of the first ones, compared with what was announced."""

from __future__ import annotations

from lightning_lamb.callbacks.promise import Promise
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.callbacks.windows import WindowMean
from lightning_lamb.lightning_seams import Trainer, strategy_accumulates


def check_window(promise: Promise, trainer: Trainer, derived: DerivedBatch | None, window: WindowMean | None) -> None:
    """Compares a window, before its optimizer step.

    Args:
        promise: told what differs.
        trainer: at the end of the window.
        derived: the batch that was announced, if one was.
        window: just closed; None: LargeBatch does not count samples.
    """
    if derived is None or promise.check == "off":
        return
    if not strategy_accumulates(trainer):
        check_accumulation(promise, trainer, derived)
    if window is not None and promise.is_first_window:
        check_samples(promise, trainer, derived, window)


def check_accumulation(promise: Promise, trainer: Trainer, derived: DerivedBatch) -> None:
    """Compares the accumulation that Lightning divides losses by with what LargeBatch derived.

    Args:
        promise: told what differs.
        trainer: at the end of a window.
        derived: the batch that was announced.
    """
    if trainer.accumulate_grad_batches != derived.accumulate_grad_batches:
        promise.compare(
            "accumulate_grad_batches",
            derived.accumulate_grad_batches,
            trainer.accumulate_grad_batches,
            "a callback or the module's own code that sets trainer.accumulate_grad_batches",
            "Leave the accumulation to LargeBatch; stages change it (LargeBatch(stages=[...])).",
            where=f"at optimizer step {trainer.global_step}",
        )


def check_samples(promise: Promise, trainer: Trainer, derived: DerivedBatch, window: WindowMean) -> None:
    """Compares the samples of a first window, over all ranks, with the global batch.

    A short window at the end of an epoch is what it is, and reported counts are no samples. The host reads the total,
    which on several ranks is on the device, in first windows only.

    Args:
        promise: told what differs.
        trainer: at the end of a window.
        derived: the batch that was announced.
        window: just closed.
    """
    if window.counts_reports or trainer.is_last_batch:
        return
    found = round(float(window.total))
    if found and found != derived.global_batch_size:
        promise.compare(
            "samples of the first window over all ranks",
            derived.global_batch_size,
            found,
            "a dataloader, sampler or collate_fn whose batches have another size than it says, or a training_step that "
            "skips micro-batches (returns None)",
            f"Make the dataloader give batches of {derived.micro_batch_size}, or tell their size: "
            "LargeBatch(micro_batch_size=...).",
        )
