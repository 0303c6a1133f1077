"""The digits example under `LambDeepSpeedStrategy` as a user runs it: two ranks, killed, resumed, moved to one rank."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")

from lightning_lamb.deepspeed import fp32_state_dict, to_universal

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 6
LAST = "runs/digits/version_0/checkpoints/last.ckpt"


def command(*options: str) -> list[str]:
    script = [
        sys.executable,
        str(ROOT / "examples/digits/train.py"),
        "fit",
        "--config",
        str(ROOT / "configs/digits.yaml"),
    ]
    quick = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", f"--trainer.max_epochs={EPOCHS}"]
    return [*script, *quick, "--data.batch_size=64", *options]


def environment(folder: Path) -> dict[str, str]:
    """A user's, without the collectives in shared memory that DeepSpeed compiles for a minute."""
    switch = 'import deepspeed\n\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'
    (folder / "sitecustomize.py").write_text(switch)
    inherited = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LAMB_DATA"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def run(folder: Path, *options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        command(*options),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"


def run_until(folder: Path, file: Path, *options: str) -> None:
    """Kills all ranks once ``file`` is there."""
    folder.mkdir(exist_ok=True)
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command(*options),
            cwd=folder,
            env=environment(folder),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        deadline = time.monotonic() + 240
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() is None, (folder / "output.txt").read_text()[-4000:]
        assert file.exists(), "no checkpoint within four minutes"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def weights(saved: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a checkpoint; without ZeRO it is a plain one inside DeepSpeed's folder."""
    if not list((saved / "checkpoint").glob("*_optim_states.pt")):
        return torch.load(saved / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    return {name: value for name, value in fp32_state_dict(saved).items() if name.startswith("net.")}


def test_accuracy(folder: Path) -> float:
    with (folder / "runs/digits/version_0/metrics.csv").open() as file:
        return max(float(row["test_accuracy"]) for row in csv.DictReader(file) if row.get("test_accuracy"))


test_accuracy.__test__ = False  # type: ignore[attr-defined]


def kept_every_second_epoch() -> list[str]:
    callback = "lightning.pytorch.callbacks.ModelCheckpoint"
    options = ["dirpath=kept", "filename={epoch}", "every_n_epochs=2", "save_top_k=-1"]
    return [f"--trainer.callbacks+={callback}", *(f"--trainer.callbacks.{option}" for option in options)]


def universal(folder: Path, stage: int) -> str:
    """A YAML that loads converted checkpoints."""
    settings: dict[str, Any] = {"zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": True}}
    strategy = {
        "class_path": "lightning_lamb.deepspeed.LambDeepSpeedStrategy",
        "init_args": {"config": settings},
    }
    (folder / "universal.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "devices": 1}}))
    return f"--config={folder / 'universal.yaml'}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_digits_train_at_an_accumulated_batch_are_killed_resumed_and_move_to_one_rank(stage: int, tmp_path: Path):
    on_two = [f"--trainer.strategy=lamb_deepspeed_stage_{stage}", "--trainer.devices=2"]
    run(tmp_path / "whole", *on_two)
    assert test_accuracy(tmp_path / "whole") > 0.8
    expected = weights(tmp_path / "whole" / LAST)

    killed = tmp_path / "killed"
    run_until(killed, killed / "kept/epoch=1.ckpt/latest", *on_two, *kept_every_second_epoch())
    resumed = tmp_path / "resumed"
    run(resumed, *on_two, f"--ckpt_path={killed / 'kept/epoch=1.ckpt'}")
    found = weights(resumed / LAST)
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []

    moved, saved = tmp_path / "moved", killed / "kept/epoch=1.ckpt"
    if stage:
        saved = to_universal(saved, tmp_path / "universal.ckpt")
    options = [universal(tmp_path, stage)] if stage else [*on_two[:1], "--trainer.devices=1"]
    run(moved, *options, f"--ckpt_path={saved}")
    found = weights(moved / LAST)
    for name, value in expected.items():  # the same batches, summed in another order
        torch.testing.assert_close(
            found[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
