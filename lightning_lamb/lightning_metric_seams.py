"""Lightning's logging: numbers for the loggers and ``callback_metrics`` that cost nothing between logging steps.

Whatever was logged once with ``self.log`` is looked at by Lightning twice after every further micro-batch of the epoch.
With a number for every layer, that would slow down all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lamb.lightning_seams import LightningModule, Trainer, closes_window


def is_logging_step(trainer: Trainer) -> bool:
    """Whether the loggers, if there are any, get this step's numbers; ranks with other loggers may differ.

    Reads ``_logger_connector.should_update_logs``.
    """
    return logs_are_due(trainer) and closes_window(trainer)


def logs_are_due(trainer: Trainer) -> bool:
    """The same where a window is known to be closed."""
    return bool(trainer._logger_connector.should_update_logs or trainer.fast_dev_run)  # type: ignore[attr-defined]


class StepLog:
    """Logs numbers at one step, and takes them out of what Lightning looks at after every other step.

    Lightning's records of them are made once and put back at the next logging step. Reads and writes ``_results``.
    """

    def __init__(self) -> None:
        self._results: Any = None
        self._records: dict[str, tuple[str, Any]] = {}
        self._shown: list[str] = []

    def log(self, trainer: Trainer, module: LightningModule, values: Mapping[str, Tensor]) -> None:
        """Logs at this step, to loggers and ``callback_metrics``; call it in ``on_train_batch_end``.

        Args:
            trainer: the Trainer.
            module: logs.
            values: 0-dim tensors by name. No communication: each rank keeps its own.
        """
        results: Any = trainer._results
        if results is not self._results:  # another fit
            self._results, self._records, self._shown = results, {}, []
        new = {name: value for name, value in values.items() if name not in self._records}
        for name, value in values.items():
            if name in self._records:
                key, record = self._records[name]
                results[key] = record
                results.update_metrics(key, value, 1)
                self._shown.append(key)
        if new:
            before = set(results)
            module.log_dict(new, on_step=True, on_epoch=False, rank_zero_only=True)
            made = {key: record for key, record in results.items() if key not in before}
            self._records.update({record.meta.name: (key, record) for key, record in made.items()})
            self._shown += made

    def forget(self) -> None:
        """Removes what the last `log` added; ``callback_metrics`` and ``logged_metrics`` keep the numbers."""
        if self._shown:
            for key in self._shown:
                self._results.pop(key, None)
            self._shown = []


def publish_metric(trainer: Trainer, name: str, value: Tensor) -> None:
    """Makes a number one of ``trainer.callback_metrics``. Writes ``_logger_connector._callback_metrics``."""
    trainer._logger_connector._callback_metrics[name] = value


def loss_scale(trainer: Trainer) -> Tensor | None:
    """What a GradScaler has multiplied this window's losses by, a 0-dim tensor; None without one. Reads ``_scale``."""
    scale: Tensor | None = getattr(getattr(trainer, "scaler", None), "_scale", None)
    return scale
