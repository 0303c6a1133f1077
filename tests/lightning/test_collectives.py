"""Every rank takes part in every collective of LargeBatch, whatever the ranks do not share; and it is one per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lamb import LargeBatch, TrustRatioMonitor
from lightning_lamb.callbacks import ThroughputMonitor, report_count
from lightning_lamb.errors import ConflictError
from tests.distributed import RankError, rank, run_ranks
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data, weights

TIME_LIMIT = 150.0


class Counting(Callback):
    """Counts Python's calls of collectives after the first micro-batch began."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.in_training: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name in ("all_reduce", "barrier", "all_gather", "all_gather_object", "reduce"):
            self._watch(name, getattr(dist, name))

    def _watch(self, name: str, collective: Any) -> None:
        def watched(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            return collective(*args, **options)

        setattr(dist, name, watched)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.in_training = list(self.calls)


def trained(folder: str | None, loggers_on: tuple[int, ...], callbacks: list[Any], **options: Any) -> Any:
    module = Regression()
    trainer = quiet_trainer(
        **(
            {
                "devices": 2,
                "strategy": "ddp",
                "max_epochs": 2,
                "callbacks": [LargeBatch(16), *callbacks, Recorder()],
                "use_distributed_sampler": False,
                "logger": CSVLogger(f"{folder}/{rank()}") if rank() in loggers_on else False,
                "log_every_n_steps": 1 + rank(),
            }
            | options
        )
    )
    trainer.fit(module, datamodule=Batches(regression_data(60), 4))
    return trainer, module


def unlike_loggers(folder: str, loggers_on: tuple[int, ...]) -> dict[str, Any]:
    counting = Counting()
    trainer, module = trained(folder, loggers_on, [counting, TrustRatioMonitor(), ThroughputMonitor()])
    return {
        "weights": weights(module),
        "calls": counting.in_training,
        "steps": trainer.global_step,
        "loss": float(trainer.callback_metrics["train_loss_window"]),
    }


@pytest.mark.parametrize("loggers_on", [(0,), ()], ids=["rank 0 alone", "none"])
def test_ranks_with_other_loggers_train_the_same_with_one_all_reduce_per_step(
    tmp_path: Path, loggers_on: tuple[int, ...]
) -> None:
    """Rank 0 alone reduced the window's loss, and both waited for ever; each reduction was a barrier too."""
    first, second = run_ranks(unlike_loggers, 2, str(tmp_path), loggers_on, init_group=False, timeout=TIME_LIMIT)
    assert first["calls"] == second["calls"] == ["all_reduce"] * first["steps"]
    assert first["loss"] == second["loss"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


def monitored(folder: str) -> tuple[int, float]:
    callbacks: list[Any] = [
        EarlyStopping("train_loss_window", patience=5, check_on_train_epoch_end=True),
        ModelCheckpoint(folder, monitor="train_loss_window", save_on_train_epoch_end=True),
        ModelCheckpoint(f"{folder}/steps", monitor="train_loss_window", every_n_train_steps=2, save_top_k=2),
    ]
    trainer, _ = trained(None, (), callbacks, enable_checkpointing=True)
    return trainer.global_step, float(trainer.callback_metrics["train_loss_window"])


def test_callbacks_can_monitor_the_window_loss_without_a_logger(tmp_path: Path) -> None:
    (first, second) = run_ranks(monitored, 2, str(tmp_path), init_group=False, timeout=TIME_LIMIT)
    assert first == second
    assert list(tmp_path.glob("*.ckpt"))
    assert list(tmp_path.glob("steps/*.ckpt"))


class Partly(Regression):
    """Reports a count on rank 0 only."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if rank() == 0:
            report_count(self, 3)
        return super().training_step(batch, batch_idx)


def partly(precision: str) -> str:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)] if precision == "16-mixed" else []
    trainer = quiet_trainer(
        devices=2, strategy="ddp", max_epochs=1, callbacks=[LargeBatch(16)], use_distributed_sampler=False,
        plugins=plugins,
    )  # fmt: skip
    module = Partly()
    try:
        trainer.fit(module, datamodule=Batches(regression_data(32), 4))
    except ConflictError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_reports_on_some_ranks_only_are_refused_on_all(precision: str) -> None:
    for message in run_ranks(partly, 2, precision, init_group=False, timeout=TIME_LIMIT):
        assert "report_count for some ranks and not for others" in message


def failing_on_rank_1() -> None:
    class Failing(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if rank() == 1 and batch_idx == 1:
                raise RuntimeError("on one rank")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(
        devices=2, strategy="ddp", max_epochs=1, callbacks=[LargeBatch(16)], use_distributed_sampler=False
    )
    trainer.fit(Failing(), datamodule=Batches(regression_data(32), 4))


def test_an_exception_on_one_rank_is_that_exception() -> None:
    """LargeBatch must not wait for the other ranks on its way out."""
    with pytest.raises(RankError, match=r"(?s)rank 1 of the test:.*on one rank"):
        run_ranks(failing_on_rank_1, 2, init_group=False, timeout=TIME_LIMIT)
