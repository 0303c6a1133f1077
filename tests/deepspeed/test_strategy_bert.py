"""BERT in two stages under ZeRO 2: the config of the example, shortened, on two ranks."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")

from tests.deepspeed.test_strategy_digits import ROOT, environment

STEPS = (6, 4)


def shortened() -> dict:
    """bert-tiny with fewer steps, by the strategy's name."""
    config = yaml.safe_load((ROOT / "configs" / "bert-tiny.yaml").read_text())
    batch = config["trainer"]["callbacks"][0]["init_args"]
    for stage, steps in zip(batch["stages"], STEPS, strict=True):
        stage["steps"] = steps
        stage["data"]["steps_per_epoch"] = steps // 2
        stage.pop("warmup_fraction")
        stage["warmup_steps"] = 2
        stage["micro_batch_size"] //= 2  # per rank, of two
    own = {"accelerator": "cpu", "devices": 2, "strategy": "lamb_deepspeed_stage_2", "enable_progress_bar": False}
    config["trainer"] |= own
    return config


@pytest.mark.slow
def test_both_stages_train_as_planned_and_the_loss_falls(tmp_path: Path):
    (tmp_path / "bert.yaml").write_text(yaml.safe_dump(shortened()))
    command = [sys.executable, str(ROOT / "examples/bert/train.py"), "fit", "--config", "bert.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    with (tmp_path / "runs/bert/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    windows = [row for row in rows if row["samples_per_step"]]
    assert [(float(row["samples_per_step"]), float(row["sequence_length"])) for row in windows] == [
        *[(256.0, 32.0)] * STEPS[0],
        *[(128.0, 128.0)] * STEPS[1],
    ]
    rates = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    peak = 0.014 * 2**0.5
    first, second = (STEPS[0] * [peak], STEPS[1] * [0.014])
    planned = [lr * ((step + 1) / 2 if step < 2 else 1 - step / len(first)) for step, lr in enumerate(first)]
    planned += [lr * ((step + 1) / 2 if step < 2 else 1 - step / len(second)) for step, lr in enumerate(second)]
    assert [rates[step] for step in range(sum(STEPS))] == pytest.approx(planned, rel=1e-5)
    losses = [float(row["val_mlm_loss"]) for row in rows if row["val_mlm_loss"]]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
