"""`ThroughputMonitor`: samples and tokens per second, and how long the training still takes."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lamb.batch_stages import BatchStage
from lightning_lamb.callbacks.large_batch import LargeBatch, large_batch_of
from lightning_lamb.callbacks.sample_counts import SampleCounter
from lightning_lamb.callbacks.stage_switch import LENGTH_OPTIONS
from lightning_lamb.checks import whole_number
from lightning_lamb.errors import InvalidOptionError, LightningLambError, PlanError
from lightning_lamb.lightning_seams import (
    Callback,
    LightningModule,
    Trainer,
    data_parallel_size,
    rank_zero_warn,
    total_optimizer_steps,
)
from lightning_lamb.staged_batches import StagedBatches


class ThroughputMonitor(Callback):
    """Logs what an optimizer step took in, and how fast: to the progress bar and to the loggers.

    Logs ``samples_per_step`` (counted, over all ranks), ``samples_per_second``, with `tokens` also
    ``tokens_per_second``, and ``eta_minutes``, all from the last steps. Loading the data counts, validation does not.
    Other ranks are taken to see as much as this one: there is no communication, and the device is not synchronised, so
    that the first numbers on a GPU are those of a queue that fills. The remaining time of later stages of a LargeBatch
    is estimated from their samples, times their sequence length. What cannot be known is left out: the remaining time
    of a training without an end (an IterableDataset without ``max_steps``), samples that a batch does not tell.

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
        self._plan: StagedBatches | None = None
        self._large_batch: LargeBatch | None = None
        self._counter = SampleCounter(None)
        self._counts_samples = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier ``fit``."""
        self.steps.clear()
        self._open, self._steps_done = (0.0, 0, 0), trainer.global_step
        try:
            self._total_steps = total_optimizer_steps(trainer)
        except PlanError:  # it has no end, or one that nobody knows
            self._total_steps = None
        self._large_batch = large_batch_of(trainer)
        self._plan = None if self._large_batch is None else self._large_batch.plan
        self._counter, self._counts_samples = SampleCounter(None), True

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
        counted = self._samples_in(trainer, batch, batch_idx) * ranks
        self._open = (seconds, samples + counted, tokens + self._tokens_in(batch) * ranks)
        if trainer.global_step == self._steps_done:
            return
        if self._plan is not None and self._plan.at(trainer.global_step - 1) != self._plan.at(self._steps_done - 1):
            self.steps.clear()  # steps of another size
        self._steps_done = trainer.global_step
        self.steps.append(self._open)
        if self._counts_samples:
            pl_module.log("samples_per_step", float(self._open[1]), rank_zero_only=True)
        self._open = (0.0, 0, 0)
        for name, rate in self.rates().items():
            pl_module.log(name, rate, prog_bar=name != "samples_per_second", rank_zero_only=True)

    def rates(self) -> dict[str, float]:
        """What is logged after a step, by name."""
        seconds, samples, tokens = (sum(column) for column in zip(*self.steps, strict=True))
        rates = {"samples_per_second": samples / seconds} if self._counts_samples else {}
        if self.tokens is not None:
            rates["tokens_per_second"] = tokens / seconds
        if self._total_steps is not None:
            rates["eta_minutes"] = self._steps_to_go(self._total_steps) * seconds / len(self.steps) / 60
        return rates

    def _steps_to_go(self, total_steps: int) -> float:
        """The remaining steps, those of later stages converted into steps of the present one's size."""
        if self._plan is None:
            return float(max(total_steps - self._steps_done, 0))
        present = work_per_step(self._plan.stages[self._plan.at(self._steps_done - 1)])
        to_go = 0.0
        for index, stage in enumerate(self._plan.stages):
            steps = min(self._plan.end_of(index) - self._steps_done, self._plan.steps[index])
            to_go += max(steps, 0) * work_per_step(stage) / present
        return to_go

    def _samples_in(self, trainer: Trainer, batch: Any, batch_idx: int) -> int:
        """Counted as LargeBatch counts; 0 from where on they cannot be."""
        if not self._counts_samples:
            return 0
        derived = None if self._large_batch is None else self._large_batch.derived
        full = None if derived is None else derived.micro_batch_size
        if full != self._counter.micro_batch_size:  # a stage began
            self._counter = SampleCounter(full)
        try:
            return self._counter.count(trainer, batch, batch_idx)
        except LightningLambError as error:
            self._counts_samples = False
            rank_zero_warn(f"ThroughputMonitor goes on without samples: {error}")
            return 0

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


def work_per_step(stage: BatchStage) -> int:
    """Samples of an optimizer step, times their sequence length where the stage sets it."""
    lengths = [stage.data[name] for name in LENGTH_OPTIONS if isinstance(stage.data.get(name), int)]
    return stage.global_batch_size * (lengths[0] if lengths else 1)
