"""Trainings under `LambDeepSpeedStrategy` continue from checkpoints: bitwise, and on another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import largest_error, on_ranks
from zero_training import BATCH, LR, expected, fit, weights_of, windows_of

from lightning_lamb.deepspeed import to_universal

STEPS = len(windows_of(BATCH, 4))


def large_batch() -> Any:
    from lightning_lamb import LargeBatch

    return LargeBatch(global_batch_size=BATCH, base_batch_size=4, warmup_steps=3)


def run_saving(folder: str, stages: list[int]) -> dict[int, Any]:
    """Worker: four epochs, saving on the way after the second."""
    import lightning.pytorch as pl

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(f"{folder}/{trainer.strategy.config['zero_optimization']['stage']}.ckpt")

    return {stage: weights_of(fit(stage, epochs=4, callbacks=[large_batch(), Save()])[0]) for stage in stages}


def run_resuming(folder: str, stages: list[int], universal: bool) -> dict[int, Any]:
    """Worker: the last two epochs; and what an unconverted checkpoint of other ranks says."""
    found: dict[int, Any] = {}
    config = {"checkpoint": {"load_universal": True}} if universal else {}
    for stage in stages:
        options = {"epochs": 4, "callbacks": [large_batch()]}
        refused = ""
        if universal:
            try:
                fit(stage, resume=f"{folder}/{stage}.ckpt", **options)
            except Exception as error:  # noqa: BLE001 - its text is the result
                refused = f"{type(error).__name__}: {error}"
        options = {"epochs": 4, "callbacks": [large_batch()], "config": config}
        trainer, model = fit(stage, resume=f"{folder}/{stage}{'-universal' * universal}.ckpt", **options)
        found[stage] = {
            "weights": weights_of(trainer),
            "steps": trainer.global_step,
            "rates": model.rates,
            "refused": refused,
        }
    return found


@pytest.mark.parametrize("stages", [[3], pytest.param([1, 2], marks=pytest.mark.slow)])
def test_a_run_resumes_bitwise_on_its_ranks_and_exactly_on_another_number(stages, tmp_path):
    schedule = {"total_steps": STEPS, "warmup_steps": 3}
    exact = expected(windows_of(BATCH, 4), lr=2 * LR, schedule=schedule)
    whole = on_ranks(run_saving, 2, str(tmp_path), stages)[0]
    for stage, resumed in on_ranks(run_resuming, 2, str(tmp_path), stages, False)[0].items():
        assert resumed["steps"] == STEPS
        assert largest_error(resumed["weights"], whole[stage]) == 0.0
        assert largest_error(whole[stage], exact) <= 5e-6
        to_universal(tmp_path / f"{stage}.ckpt", tmp_path / f"{stage}-universal.ckpt")
    for alone in on_ranks(run_resuming, 1, str(tmp_path), stages, True)[0].values():
        assert "StateDictError" in alone["refused"]
        assert "to_universal" in alone["refused"]
        assert alone["steps"] == STEPS
        assert largest_error(alone["weights"], exact) <= 5e-6
