"""`ThroughputMonitor`: samples and tokens per second, and how long the training still takes."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lamb.callbacks.windows import samples_in
from lightning_lamb.checks import whole_number
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.lightning_seams import Callback, LightningModule, Trainer, data_parallel_size, total_optimizer_steps


class ThroughputMonitor(Callback):
    """Logs what an optimizer step took in, and how fast: to the progress bar and to the loggers.

    Logs ``samples_per_step`` (counted, over all ranks), ``samples_per_second``, with `tokens` also
    ``tokens_per_second``, and ``eta_minutes``, all from the last steps. Loading the data counts, validation does not.
    Other ranks are taken to see as much as this one: there is no communication, and the device is not synchronised, so
    that the first numbers on a GPU are those of a queue that fills.

    Args:
        tokens: Key of a tensor in the batch whose elements are tokens, padding included, such as "input_ids". None: do
            not count tokens.
        window: Optimizer steps that the rates are averaged over.

    Raises:
        InvalidOptionError: `window` is below 1, or batches have no tensor of that key.
    """

    def __init__(self, tokens: str | None = None, window: int = 20) -> None:
        super().__init__()
        self.tokens = tokens
        self.steps: deque[tuple[float, int, int]] = deque(maxlen=whole_number("window", window))
        """(seconds, samples, tokens) of the last optimizer steps."""
        self._open = (0.0, 0, 0)
        self._started = math.nan
        self._steps_done = 0
        self._total_steps: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier ``fit``."""
        self.steps.clear()
        self._open, self._steps_done = (0.0, 0, 0), trainer.global_step
        bounded = trainer.max_steps != -1 or trainer.max_epochs not in (None, -1)
        self._total_steps = total_optimizer_steps(trainer) if bounded else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock before the first micro-batch is loaded."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts it again."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the micro-batch up, and logs after an optimizer step."""
        ranks = data_parallel_size(trainer)
        seconds, samples, tokens = self._open
        now = time.perf_counter()
        seconds, self._started = seconds + now - self._started, now
        self._open = (seconds, samples + samples_in(batch) * ranks, tokens + self._tokens_in(batch) * ranks)
        if trainer.global_step == self._steps_done:
            return
        self._steps_done = trainer.global_step
        self.steps.append(self._open)
        pl_module.log("samples_per_step", float(self._open[1]), rank_zero_only=True)
        self._open = (0.0, 0, 0)
        for name, rate in self.rates().items():
            pl_module.log(name, rate, prog_bar=name != "samples_per_second", rank_zero_only=True)

    def rates(self) -> dict[str, float]:
        """What is logged after a step, by name."""
        seconds, samples, tokens = (sum(column) for column in zip(*self.steps, strict=True))
        rates = {"samples_per_second": samples / seconds}
        if self.tokens is not None:
            rates["tokens_per_second"] = tokens / seconds
        if self._total_steps is not None:
            remaining = max(self._total_steps - self._steps_done, 0)
            rates["eta_minutes"] = remaining * seconds / len(self.steps) / 60
        return rates

    def _tokens_in(self, batch: Any) -> int:
        if self.tokens is None:
            return 0
        found = batch.get(self.tokens) if isinstance(batch, Mapping) else None
        if not isinstance(found, Tensor):
            keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"no keys (a {type(batch).__name__})"
            raise InvalidOptionError(
                f"ThroughputMonitor(tokens={self.tokens!r}): the batch has no tensor of that key; it has {keys}. Give "
                "the key of the token ids, or leave tokens out."
            )
        return found.numel()
