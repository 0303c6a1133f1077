"""`LambDeepSpeedStrategy` trains exactly: LargeBatch, accumulation, clipping, offload, the monitor and testing."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from torch.utils.data import DataLoader
from zero_setting import largest_error, on_ranks
from zero_training import (
    BATCH,
    BUCKETS,
    LR,
    data,
    expected,
    fit,
    loss_at,
    weights_of,
    windows_of,
)

OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 1": (1, {}),
    "stage 3, offloaded": (3, OFFLOADED),
    "stage 0": (0, {}),
    "stage 2": (2, {}),
    "stage 2, offloaded": (2, OFFLOADED),
    "stage 3": (3, {}),
}

# ---- LargeBatch and the monitor


def recording_logger() -> Any:
    """A logger that keeps the trust ratios of every step."""
    from lightning.pytorch.loggers.logger import DummyLogger

    class Recording(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[dict[str, float]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            found = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith("trust_ratio/")}
            if found:
                self.rows.append(found)

    return Recording()


def run_large_batch(labels: list[str]) -> dict[str, Any]:
    from lightning_lamb import LargeBatch, TrustRatioMonitor

    found = {}
    for label in labels:
        stage, options = SETTINGS[label]
        config = {"zero_optimization": {"stage": stage, **BUCKETS, **options}}
        callbacks = [LargeBatch(global_batch_size=BATCH, base_batch_size=4, warmup_steps=3), TrustRatioMonitor()]
        logger = recording_logger()
        trainer, model = fit(
            stage,
            callbacks=callbacks,
            config=config,
            gradient_clip_val=0.5,
            epochs=2,
            logger=logger,
            log_every_n_steps=1,
        )
        engine = trainer.strategy.deepspeed_engine
        found[label] = {
            "weights": weights_of(trainer),
            "steps": trainer.global_step,
            "accumulation": engine.gradient_accumulation_steps(),
            "train_batch_size": engine.train_batch_size(),
            "rates": model.rates,
            "ratios": logger.rows,
        }
        found[label]["tested"] = trainer.test(model, DataLoader(data(), 8), verbose=False)[0]["test_loss"]
    return found


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param(list(SETTINGS)[:2], id="few"),
        pytest.param(list(SETTINGS)[2:], id="the others", marks=pytest.mark.slow),
    ],
)
def test_large_batch_trains_its_batch_exactly_short_last_windows_included_and_the_monitor_sees_it(labels):
    """72 samples in windows of 16: the last of an epoch has 8, and its gradient is the mean over these 8."""
    steps = len(windows_of(BATCH, 2))
    schedule = {"total_steps": steps, "warmup_steps": 3}
    ratios: list[dict[str, float]] = []
    exact = expected(windows_of(BATCH, 2), lr=2 * LR, clip=0.5, schedule=schedule, ratios=ratios)
    for label, found in on_ranks(run_large_batch, 2, labels)[0].items():
        assert found["steps"] == steps, label
        assert found["accumulation"] == 4, label
        assert found["train_batch_size"] == BATCH, label
        assert found["rates"][0] == pytest.approx(2 * LR / 3), label
        assert largest_error(found["weights"], exact) <= 5e-6, label
        assert found["tested"] == pytest.approx(loss_at(exact), rel=1e-5), label
        assert len(found["ratios"]) == steps, label
        for got, ratio in zip(found["ratios"], ratios):
            assert got == pytest.approx(ratio, rel=1e-4), label


# ---- traps 8 and 9


def run_accumulation(stages: list[int]) -> dict[str, Any]:
    import lightning.pytorch as pl

    class Changing(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.accumulate_grad_batches = (4, 2, 3)[trainer.current_epoch]

    found: dict[str, Any] = {"norms": {}, "weights": {}, "steps": {}}
    for accumulation, micro_batch in ((1, 8), (2, 4), (4, 2)):
        _, model = fit(2, micro_batch=micro_batch, accumulate_grad_batches=accumulation, max_steps=1)
        found["norms"][accumulation] = model.norms[-1]
    for stage in stages:
        trainer, _ = fit(stage, micro_batch=2, callbacks=[Changing()], epochs=3, gradient_clip_val=5.0)
        found["weights"][stage] = weights_of(trainer)
        found["steps"][stage] = (trainer.global_step, trainer.strategy.deepspeed_engine.global_steps)
    return found


@pytest.mark.parametrize("stages", [[0, 3], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_traps_8_and_9_the_loss_is_divided_once_and_lightning_alone_counts(stages):
    """Lightning's own strategy halves gradients at an accumulation of 2, and its count drifts from DeepSpeed's."""
    found = on_ranks(run_accumulation, 2, stages)[0]
    assert found["norms"][2] == pytest.approx(found["norms"][1], rel=1e-5)
    assert found["norms"][4] == pytest.approx(found["norms"][1], rel=1e-5)
    windows, scales = [], []
    for accumulation in (4, 2, 3):  # without LargeBatch, a short window is divided by the whole accumulation
        epoch = windows_of(4 * accumulation)
        windows += epoch
        scales += [len(window) / (4 * accumulation) for window in epoch]
    exact = expected(windows, clip=5.0, scales=scales)
    for stage in stages:
        assert found["steps"][stage] == (len(windows), len(windows)), stage
        assert largest_error(found["weights"][stage], exact) <= 5e-6, stage
