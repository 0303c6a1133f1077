"""What reaches the loggers and ``callback_metrics``, without the price that ``self.log`` has ever after.

Everything once logged with ``self.log`` is looked at again by Lightning after every micro-batch of the epoch, twice.
What is logged at logging steps only, by the layer, would so slow down all other steps.
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
    due = trainer._logger_connector.should_update_logs or trainer.fast_dev_run  # type: ignore[attr-defined]
    return bool(due and closes_window(trainer))


class StepLog:
    """Logs numbers at one step, and removes them from what Lightning looks at afterwards."""

    def __init__(self) -> None:
        self._logged: list[tuple[dict[str, Any], str]] = []

    def log(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float | Tensor]) -> None:
        """Logs at this step, to loggers and ``callback_metrics``; call it in ``on_train_batch_end``.

        Args:
            trainer: the Trainer.
            module: logs.
            values: numbers by name. No communication: each rank keeps its own.
        """
        results: Any = trainer._results
        before = set(results)
        module.log_dict(values, on_step=True, on_epoch=False, rank_zero_only=True)
        self._logged += [(results, key) for key in results if key not in before]

    def forget(self) -> None:
        """Removes what the last `log` added; ``callback_metrics`` and ``logged_metrics`` keep the numbers."""
        for results, key in self._logged:
            results.pop(key, None)
        self._logged.clear()


def publish_metric(trainer: Trainer, name: str, value: Tensor) -> None:
    """Makes a number one of ``trainer.callback_metrics``. Writes ``_logger_connector._callback_metrics``."""
    trainer._logger_connector._callback_metrics[name] = value


def loss_scale(trainer: Trainer) -> Tensor | None:
    """What a GradScaler has multiplied this window's losses by, a 0-dim tensor; None without one. Reads ``_scale``."""
    scale: Tensor | None = getattr(getattr(trainer, "scaler", None), "_scale", None)
    return scale
