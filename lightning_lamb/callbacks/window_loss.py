"""The loss of a whole window: the mean over everything in it and over all ranks, as one large batch would have had it.

Lightning's own logged loss is that of the last micro-batch of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    closes_window,
    device_of,
    is_logging_step,
    sum_over_data_ranks,
)


class WindowLoss:
    """Adds up the losses of a window. Nothing is read on the host.

    Args:
        name: to log it under; None: it is not.
        loss_reduction: what ``training_step`` returns: the "mean" over its count, or the "sum".
    """

    def __init__(self, name: str | None, loss_reduction: Literal["mean", "sum"]) -> None:
        self._name = name
        self._reduction = loss_reduction
        self._loss: float | Tensor = 0.0
        self._count: float | Tensor = 0.0

    def add(self, trainer: Trainer, module: LightningModule, outputs: Any, count: float | Tensor) -> None:
        """Adds a micro-batch, and logs the window if that was its last.

        Args:
            trainer: the Trainer.
            module: logs.
            outputs: of ``on_train_batch_end``, where Lightning has divided the loss by the accumulation.
            count: what the loss is the mean or the sum of.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._name is None:
            return
        if isinstance(loss, Tensor):  # training_step may return None
            loss = loss.detach().float() * trainer.accumulate_grad_batches
            self._loss = self._loss + (loss * count if self._reduction == "mean" else loss)
            self._count = self._count + count
        if closes_window(trainer):
            self._log(trainer, module, self._name)

    def _log(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        """Logs the window's loss, where the Trainer logs, and begins the next; one all-reduce of two numbers then."""
        loss, count = self._loss, self._count
        self._loss, self._count = 0.0, 0.0
        if not is_logging_step(trainer):
            return
        device = device_of(module)
        pair = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in (loss, count)])
        total = sum_over_data_ranks(trainer, pair)
        module.log(name, total[0] / total[1].clamp(min=1e-30), rank_zero_only=True)
