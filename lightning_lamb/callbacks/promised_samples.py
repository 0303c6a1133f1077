"""The samples of every window and the accumulation, compared with what was announced."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from typing import Any

from lightning_lamb.callbacks.promise import Promise
from lightning_lamb.callbacks.sample_counts import SampleCounter
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.callbacks.windows import REPORT, WindowMean
from lightning_lamb.errors import LightningLambError
from lightning_lamb.lightning_resume_seams import loop_counters
from lightning_lamb.lightning_seams import LightningModule, Trainer, closes_window


class PromisedSamples:
    """Counts what arrives on this rank: numbers that the host has anyway, nothing is read from a device.

    Args:
        promise: told what differs.
    """

    def __init__(self, promise: Promise) -> None:
        self._promise = promise
        self._micro_batches = 0
        self._samples = 0
        self._counter: SampleCounter | None = None

    def begin(self) -> None:
        """A window begins, whatever an epoch that was cut short, or a fit that failed, has left."""
        self._micro_batches, self._samples = 0, 0

    def begin_micro_batch(
        self,
        trainer: Trainer,
        module: LightningModule,
        derived: DerivedBatch | None,
        window: WindowMean | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts a micro-batch before it is trained on, and looks at the accumulation.

        Args:
            trainer: the Trainer.
            module: what it trains.
            derived: what was announced.
            window: has counted the micro-batch; None: it is counted here.
            batch: what ``training_step`` gets.
            batch_idx: of the epoch.

        Raises:
            PromiseError: another accumulation was set.
        """
        if self._promise.check == "off" or derived is None:
            return
        if trainer.accumulate_grad_batches != derived.accumulate_grad_batches:
            self._promise.compare(
                "accumulate_grad_batches",
                derived.accumulate_grad_batches,
                trainer.accumulate_grad_batches,
                _who_assigns("accumulate_grad_batches", trainer, module),
                "Remove it: LargeBatch derives the accumulation from global_batch_size, and stages change it.",
            )
        self._micro_batches += 1
        samples = self._count(trainer, derived, batch, batch_idx) if window is None else window.samples
        self._samples += -sys.maxsize if samples is None else samples

    def _count(self, trainer: Trainer, derived: DerivedBatch, batch: Any, batch_idx: int) -> int | None:
        """The samples of a micro-batch, where no window counts them; None if they cannot be told."""
        if self._counter is None or self._counter.micro_batch_size != derived.micro_batch_size:
            self._counter = SampleCounter(derived.micro_batch_size)
        try:
            return self._counter.count(trainer, batch, batch_idx)
        except LightningLambError:
            return None

    def end_window(self, trainer: Trainer, module: LightningModule, derived: DerivedBatch | None) -> None:
        """Compares a window before its optimizer step.

        Args:
            trainer: the Trainer.
            module: what it trains; where it reports counts, samples are not compared.
            derived: what was announced.

        Raises:
            PromiseError: the window holds other samples than announced. The last of an epoch may hold fewer.
        """
        if derived is None:
            return
        micro_batches, found = self._micro_batches, self._samples
        announced = derived.accumulate_grad_batches
        full = announced * derived.micro_batch_size
        if self._promise.check == "off" or not closes_window(trainer):
            return
        self.begin()
        uncounted = found < 0 or module.__dict__.get(REPORT) is not None
        if micro_batches == announced and (uncounted or found == full):
            return
        ends_epoch = bool(loop_counters(trainer)[1].is_last_batch)
        where = f"optimizer step {trainer.global_step} (epoch {trainer.current_epoch})"
        if micro_batches > announced or (micro_batches < announced and not ends_epoch):
            self._promise.compare(
                "micro-batches",
                announced,
                micro_batches,
                "a dataloader that gave None for a batch, or a checkpoint from inside a window",
                "Leave bad samples out in the dataset or in collate_fn; continue from a checkpoint of LargeBatch's.",
                where=f"of {where}",
            )
        elif not uncounted and (found > full or not ends_epoch):
            self._promise.compare(
                "samples",
                full,
                found,
                "a dataloader or batch sampler whose batches vary (a short one in the middle of an epoch, too)",
                "Use drop_last=True or batches of one size, or count what matters with report_count in training_step.",
                where=f"of {where} on this rank",
            )


def _who_assigns(attribute: str, trainer: Trainer, module: LightningModule) -> str:
    """Whose code assigns an attribute, for a message."""
    assigns = re.compile(rf"\.{attribute}\s*[-+*/]?=[^=]|setattr\([^)]*{attribute}")
    owners: list[Any] = [*trainer.callbacks, module, trainer.datamodule]  # type: ignore[attr-defined]
    named = []
    for owner in owners:
        kind = type(owner)
        if owner is None or kind.__module__.startswith("lightning_lamb."):
            continue
        with contextlib.suppress(OSError, TypeError):  # a class without a file
            if any(assigns.search(inspect.getsource(base)) for base in kind.__mro__[:-1] if _is_users(base)):
                named.append(kind.__name__)
    return f"{' or '.join(named)}, whose code assigns it" if named else "a callback or the module's own code"


def _is_users(kind: type) -> bool:
    return not kind.__module__.startswith(("lightning.", "pytorch_lightning.", "torch.", "lightning_lamb.", "abc"))
