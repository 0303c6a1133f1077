"""The gradient of one optimizer step as the mean over everything its window holds: all samples, all tokens, all ranks.

Lightning divides every micro-batch's loss by ``accumulate_grad_batches`` and averages over ranks. That is the mean of
means: right only if every micro-batch has the same count and every window is full. Here each micro-batch is weighted
by its count, and the window's gradient is divided by the true total (Lightning issues #19987, #20350).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lamb.callbacks.gradients import multiply_gradients
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    data_parallel_size,
    device_of,
    largest_over_ranks,
    sum_over_data_ranks,
)

REPORT = "lightning_lamb_count"


def report_count(module: nn.Module, count: float | Tensor) -> None:
    """Tells LargeBatch how many things (tokens, say) the loss of this ``training_step`` is the mean or the sum of.

        def training_step(self, batch, batch_idx):
            losses, mask = ...
            report_count(self, mask.sum())
            return (losses * mask).sum() / mask.sum()

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
    """Weighs micro-batches and normalises windows for one ``fit``.

    Args:
        micro_batch_size: samples in a full micro-batch.
        loss_reduction: what ``training_step`` returns: the "mean" over its count, or the "sum".
    """

    def __init__(self, micro_batch_size: int, loss_reduction: Literal["mean", "sum"]) -> None:
        self.loss_reduction = loss_reduction
        self.micro_batches = 0
        """Micro-batches in the open window."""
        self._total: float | Tensor = 0.0
        self.last_count: float | Tensor = 0.0
        """Of the last micro-batch."""
        self._batch: Any = None
        self._reference = float(micro_batch_size)
        self._reported: bool | None = None

    def expect(self, module: LightningModule, batch: Any) -> None:
        """Notes the micro-batch that ``training_step`` gets next."""
        self._batch = batch
        setattr(module, REPORT, None)

    def weigh(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        """Multiplies the micro-batch's loss by its weight, before its backward pass.

        Args:
            trainer: the Trainer.
            module: what it trains; its report is read.
            loss: modified in place (Lightning logs a copy). Untouched for a full micro-batch without a report.
        """
        count = getattr(module, REPORT, None)
        reported = count is not None
        if count is None:
            count = float(samples_in(self._batch))
        if self._reported is None:
            if reported:
                self._reference = self._choose_reference(trainer, module, count)
        elif self._reported != reported:
            raise ConflictError(
                f"{type(module).__name__}.training_step called report_count for some micro-batches and not for others: "
                "tokens and samples would be added up. Call it in every training_step, or in none."
            )
        self._reported = reported
        if self.loss_reduction == "mean":
            weight = count / self._reference
            if isinstance(weight, Tensor) or weight != 1.0:
                loss.mul_(weight.to(loss.device, loss.dtype) if isinstance(weight, Tensor) else weight)
        self.last_count = count
        self._total = self._total + (count.double() if isinstance(count, Tensor) else count)
        self.micro_batches += 1
        self._batch = None

    def close(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Divides the window's gradients by the window's true total, just before the optimizer's step.

        Args:
            trainer: the Trainer.
            module: what it trains.
            optimizer: its gradients are modified in place. On several ranks, one all-reduce of one number.
        """
        if self.micro_batches == 0:  # every training_step of the window returned None
            return
        total, self._total, self.micro_batches = self._total, 0.0, 0
        # What Lightning and the strategy made of the window is sum(weight * loss) / (accumulation * ranks).
        numerator = float(trainer.accumulate_grad_batches * data_parallel_size(trainer))
        if self.loss_reduction == "mean":
            numerator *= self._reference
        if trainer.world_size == 1 and not isinstance(total, Tensor):
            if total != numerator:
                _multiply(trainer, optimizer, numerator / total if total else 0.0)
            return
        device = device_of(module)
        exact = torch.float32 if device.type == "mps" else torch.float64
        summed = sum_over_data_ranks(trainer, torch.as_tensor(total, dtype=exact, device=device))
        # An empty window (no token anywhere) has zero gradients, not NaN.
        _multiply(trainer, optimizer, torch.where(summed > 0, numerator / summed.clamp(min=1e-30), 0.0))

    def _choose_reference(self, trainer: Trainer, module: LightningModule, count: float | Tensor) -> float:
        """A power of two near the usual count, the same on all ranks: keeps fp16 in range and rounds nothing."""
        value = torch.as_tensor(count, dtype=torch.float32, device=device_of(module)).clone()
        largest = float(largest_over_ranks(trainer, value))  # the only host synchronisation, once per fit
        return 2.0 ** math.floor(math.log2(max(largest, 1.0)))


def _multiply(trainer: Trainer, optimizer: Optimizer, factor: float | Tensor) -> None:
    """Multiplies the window's gradients where they lie: in ``p.grad``, or where LambDeepSpeedStrategy knows."""
    if hasattr(trainer.strategy, "multiply_gradients"):
        trainer.strategy.multiply_gradients(factor)
    else:
        multiply_gradients(optimizer, factor)


def samples_in(batch: Any) -> int:
    """The first dimension of the first tensor in a batch.

    Raises:
        InvalidOptionError: there is no tensor with a dimension in it.
    """
    size = _first_dimension(batch)
    if size is None:
        raise InvalidOptionError(
            f"LargeBatch cannot count the samples of a batch of type {type(batch).__name__}: it holds no tensor with a "
            "dimension. Call lightning_lamb.callbacks.report_count(self, n) in training_step, or set "
            "exact_windows=False."
        )
    return size


def _first_dimension(value: Any) -> int | None:
    """Depth-first search for a tensor with a dimension."""
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((size for item in value if (size := _first_dimension(item)) is not None), None)
    return None
