"""The gradient of one optimizer step as the mean over everything its window holds: all samples, all tokens, all ranks.

Lightning divides every micro-batch's loss by ``accumulate_grad_batches`` and averages over ranks. That is the mean of
means: right only if every micro-batch has the same count and every window is full. Here each micro-batch is weighted
by its count, and the window's gradient is divided by the true total (Lightning issues #19987, #20350).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lamb.callbacks.gradients import multiply_gradients
from lightning_lamb.callbacks.sample_counts import SampleCounter, samples_in
from lightning_lamb.errors import ConflictError, InvalidOptionError, LightningLambError
from lightning_lamb.lightning_metric_seams import StepLog, logs_are_due, loss_scale, publish_metric
from lightning_lamb.lightning_rank_seams import largest_over_ranks, sum_over_data_ranks
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    data_parallel_size,
    device_of,
    rank_zero_warn,
)

__all__ = ["REPORT", "WindowMean", "report_count", "samples_in"]

REPORT = "lightning_lamb_count"


def report_count(module: nn.Module, count: float | Tensor) -> None:
    """Tells LargeBatch how many things (tokens, say) the loss of this ``training_step`` is the mean or the sum of.

        def training_step(self, batch, batch_idx):
            losses, mask = ...
            report_count(self, mask.sum())
            return (losses * mask).sum() / mask.sum().clamp(min=1)  # a micro-batch may hold no token at all

    Call it once per ``training_step``, in every one. Without it a micro-batch counts its samples.

    Args:
        module: the LightningModule, ``self``.
        count: a number, or a 0-dim tensor, which is not read on the host.

    Raises:
        InvalidOptionError: a number that is negative or not finite. Tensors are not looked into.
    """
    if not isinstance(count, Tensor) and not (math.isfinite(count) and count >= 0):
        raise InvalidOptionError(f"report_count: count={count} must be a finite number of at least 0.")
    setattr(module, REPORT, count.detach() if isinstance(count, Tensor) else count)


class WindowMean:
    """Weighs micro-batches, normalises windows and knows their loss, for one stage of one ``fit``.

    Args:
        micro_batch_size: samples in a full micro-batch.
        loss_reduction: what ``training_step`` returns: the "mean" over its count, or the "sum".
        loss_name: under which the window's loss is logged; None: it is not.
    """

    def __init__(
        self, micro_batch_size: int, loss_reduction: Literal["mean", "sum"], loss_name: str | None = None
    ) -> None:
        self.loss_reduction = loss_reduction
        self.total: float | Tensor = 0.0
        """The count of the last window that was closed, over all ranks."""
        self._loss_name = loss_name
        self._loss: Tensor | None = None
        self._log = StepLog()
        self._micro_batch_size = micro_batch_size
        self._samples = SampleCounter(micro_batch_size)
        self._reference = float(micro_batch_size)
        self._reported: bool | None = None
        self._ranks_compared = self._reports_checked = False
        self._counted: int | LightningLambError = 0
        self._counts: list[float | Tensor] = []
        self._losses: list[Tensor] = []

    def of_next_stage(self, micro_batch_size: int) -> WindowMean:
        """For a stage with another micro-batch; what it logs is still logged in the same place."""
        following = WindowMean(micro_batch_size, self.loss_reduction, self._loss_name)
        following._log = self._log
        return following

    # ---- micro-batches

    @property
    def micro_batches(self) -> int:
        """Micro-batches in the open window that had a loss."""
        return len(self._counts)

    @property
    def samples(self) -> int | None:
        """Of the present micro-batch; None where they cannot be told or other things are counted."""
        return None if self._reported or not isinstance(self._counted, int) else self._counted

    def begin(self) -> None:
        """Lightning has set the gradients to zero: what was added up until now is in no optimizer step."""
        if self._counts:
            rank_zero_warn(
                "LargeBatch: an epoch ended inside a window, so Lightning drops the gradients of its "
                f"{len(self._counts)} micro-batches: no optimizer step sees them."
            )
            self._counts, self._losses = [], []

    def expect(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the micro-batch that ``training_step`` gets next, which may change it."""
        self._log.forget()
        module.__dict__[REPORT] = None  # nn.Module.__setattr__ would cost as much as all the rest here
        if not self._reported:
            try:
                self._counted = self._samples.count(trainer, batch, batch_idx)
            except ConflictError:
                raise
            except LightningLambError as error:  # training_step may call report_count
                self._counted = error

    def weigh(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Multiplies the micro-batch's loss by its weight, before its backward pass.

        Args:
            trainer: the Trainer.
            module: what it trains; its report is read.
            loss: modified in place (Lightning logs a copy). Untouched for a full micro-batch without a report.

        Raises:
            ConflictError: only some micro-batches, or ranks, report a count.
            BatchSizeError: the batch holds more than the micro-batch.
            InvalidOptionError: the samples of the batch cannot be counted, and there is no report.
        """
        count: float | Tensor | None = module.__dict__.get(REPORT)
        if count is not None and self._reported is None:
            self._reference = 2.0 ** math.floor(math.log2(self._micro_batch_size))
        self._compare_ranks(trainer, module, count)
        if self._reported is None:
            self._reported = count is not None
        elif self._reported != (count is not None):
            raise ConflictError(_SOME_REPORT.format(module=type(module).__name__, which="micro-batches"))
        if count is None:
            if isinstance(self._counted, LightningLambError):
                raise self._counted
            count = float(self._counted)
        empty = bool(count == 0) if not isinstance(count, Tensor) or count.device.type == "cpu" else False
        weight = count / self._reference if self.loss_reduction == "mean" else 1.0
        untouched = not isinstance(weight, Tensor) and weight == 1.0
        if empty and not loss.isfinite():  # the host waits for the device, in such a micro-batch alone
            _Nothing.apply(loss)
        if self._loss_name is not None:
            self._losses.append(loss.detach() if untouched else loss.detach().clone())
        if not untouched:
            loss.mul_(weight.to(loss.device, loss.dtype) if isinstance(weight, Tensor) else weight)
        self._counts.append(count)

    def _compare_ranks(self, trainer: Trainer, module: LightningModule, count: float | Tensor | None) -> None:
        """Chooses the unit of reported counts: a power of two near the usual one, which rounds nothing.

        In half precision it keeps the losses in range, so the ranks agree on it: all of them take part in this one
        all-reduce per ``fit`` and stage, whether they have a report or not. The only host synchronisation here.
        """
        if self._ranks_compared:
            return
        self._ranks_compared = True
        half = str(trainer.precision).startswith("16")
        if trainer.world_size > 1 and not half:
            return
        if count is None and trainer.world_size == 1:
            return
        pair = torch.zeros(2, dtype=torch.float32, device=device_of(module))
        pair[0] = -1.0 if count is None else count
        pair[1] = count is None
        largest, some_silent = largest_over_ranks(trainer, pair).tolist()
        if some_silent and largest >= 0:
            raise ConflictError(_SOME_REPORT.format(module=type(module).__name__, which="ranks"))
        if largest >= 0:
            self._reference = 2.0 ** math.floor(math.log2(max(largest, 1.0)))

    # ---- windows

    def close(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Divides the window's gradients by the window's true total, just before the optimizer's step.

        Args:
            trainer: the Trainer.
            module: what it trains.
            optimizer: its gradients are modified in place. On several ranks, one all-reduce of three numbers (the
                count, the sum of losses, whether there was a report), by every rank in every window.

        Raises:
            ConflictError: some ranks report counts and others do not; looked at in the first window.
        """
        counts, losses = self._counts, self._losses
        self._counts, self._losses = [], []
        if not counts and trainer.world_size == 1:  # every training_step of the window returned None
            return
        # What Lightning and the strategy made of the window is sum(weight * loss) / (accumulation * ranks).
        numerator = float(trainer.accumulate_grad_batches * data_parallel_size(trainer))
        if self.loss_reduction == "mean":
            numerator *= self._reference
        if trainer.world_size == 1 and self.loss_reduction == "mean" and _are_equal_numbers(counts):
            self.total = total = counts[0] * len(counts)
            self._loss = self._mean_of_losses(trainer, losses) if losses and total else None
            if total != numerator:
                _multiply(trainer, optimizer, numerator / total if total else 0.0)
            return
        device = device_of(module)
        total = _total(counts, device)
        loss = self._sum_of_losses(trainer, losses, counts, device) if losses else None
        if trainer.world_size > 1:
            numbers = (total, 0.0 if loss is None else loss, 1.0 if self._reported else 0.0)
            summed = sum_over_data_ranks(trainer, _vector(numbers, device))
            self._check_reports(trainer, module, summed[2])
            total, loss = summed[0], None if self._loss_name is None else summed[1]
        self.total = total
        if isinstance(total, Tensor):
            self._loss = None if loss is None else (loss / total.clamp(min=1e-30)).float()
            # An empty window (no token anywhere) has zero gradients, not NaN.
            _multiply(trainer, optimizer, torch.where(total > 0, numerator / total.clamp(min=1e-30), 0.0))
            return
        self._loss = None if loss is None else (loss / (total or 1.0)).float()
        if total != numerator:
            _multiply(trainer, optimizer, numerator / total if total else 0.0)

    def publish(self, trainer: Trainer, module: LightningModule) -> None:
        """Makes the loss of a window that was just closed one of ``callback_metrics``, and logs it where loggers log.

        No communication: ranks may have different loggers.
        """
        if self._loss is None or self._loss_name is None:
            return
        loss, self._loss = self._loss, None
        if logs_are_due(trainer) and trainer.loggers:
            self._log.log(trainer, module, {self._loss_name: loss})
        publish_metric(trainer, self._loss_name, loss)

    def _sum_of_losses(
        self, trainer: Trainer, losses: list[Tensor], counts: list[float | Tensor], device: torch.device
    ) -> Tensor:
        """The losses of everything in the window added up, a 0-dim tensor; nothing is read on the host."""
        values = torch.stack([loss.reshape(()) for loss in losses]).to(device, _exact(device))
        if self.loss_reduction == "mean":
            if _are_equal_numbers(counts):
                values = values * counts[0]
            else:
                weights = _vector(counts, device)
                values = torch.where(weights > 0, values * weights, 0.0)
        # Lightning has divided by the accumulation, and a GradScaler has multiplied.
        scale = loss_scale(trainer)
        total = values.sum() * trainer.accumulate_grad_batches
        return total if scale is None else total / scale.to(device)

    def _mean_of_losses(self, trainer: Trainer, losses: list[Tensor]) -> Tensor:
        """The same, divided by the count, where all micro-batches count the same: in as few operations as possible."""
        mean = torch.stack(losses).mean(dtype=torch.float32) if len(losses) > 1 else losses[0].reshape(()).float()
        if trainer.accumulate_grad_batches > 1:
            mean = mean * trainer.accumulate_grad_batches
        scale = loss_scale(trainer)
        return mean if scale is None else mean / scale.to(mean.device)

    def _check_reports(self, trainer: Trainer, module: LightningModule, ranks_that_report: Tensor) -> None:
        """Refuses that only some ranks report, in the first window: later ones are not read on the host."""
        if self._reports_checked:
            return
        self._reports_checked = True
        if 0.5 < float(ranks_that_report) < data_parallel_size(trainer) - 0.5:
            raise ConflictError(_SOME_REPORT.format(module=type(module).__name__, which="ranks"))


class _Nothing(torch.autograd.Function):
    """Sets a loss to zero in place, and ends its backward pass: a mean over nothing is NaN, with NaN gradients.

    Every parameter's hooks still run, without a gradient, so DDP and FSDP communicate as on other ranks.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        """Zero, in place."""
        ctx.mark_dirty(loss)
        return loss.zero_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """No gradient, which is not the same as one of zero: 0 / 0 is NaN."""


_SOME_REPORT = (
    "{module}.training_step called report_count for some {which} and not for others: tokens and samples would be added "
    "up. Call it in every training_step, or in none."
)


def _are_equal_numbers(counts: Sequence[float | Tensor]) -> bool:
    first = counts[0] if counts else 0.0
    return bool(counts) and all(not isinstance(count, Tensor) and count == first for count in counts)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _vector(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """A tensor of numbers, made without the host waiting for the device (as copying a number there would)."""
    dtype = _exact(device)
    parts = [
        number.detach().reshape(()).to(device, dtype)
        if isinstance(number, Tensor)
        else torch.full((), number, dtype=dtype, device=device)
        for number in numbers
    ]
    return torch.stack(parts)


def _total(counts: Sequence[float | Tensor], device: torch.device) -> float | Tensor:
    """The sum; a number if all are numbers."""
    if any(isinstance(count, Tensor) for count in counts):
        return _vector(counts, device).sum()
    return float(sum(counts))


def _multiply(trainer: Trainer, optimizer: Optimizer, factor: float | Tensor) -> None:
    """Multiplies the window's gradients where they lie: in ``p.grad``, or where LambDeepSpeedStrategy knows."""
    if hasattr(trainer.strategy, "multiply_gradients"):
        trainer.strategy.multiply_gradients(factor)
    else:
        multiply_gradients(optimizer, factor)
