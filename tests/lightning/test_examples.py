"""The examples run, learn and resume."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str, folder: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does; it writes its runs/ into ``folder``."""
    inherited = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LAMB_DATA"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(result.stdout + result.stderr)
    return result


TRAIN = [str(ROOT / "examples/digits/train.py"), "fit", "--config", str(ROOT / "configs/digits.yaml")]
QUICK = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def logged(folder: Path, column: str) -> dict[int, float]:
    (path,) = folder.glob("runs/digits/version_0/metrics.csv")
    with path.open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


@pytest.mark.slow
def test_the_main_job_learns_logs_checkpoints_and_resumes(tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir()
    half.mkdir()
    epochs = "--trainer.max_epochs=20"
    keep_some = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.dirpath=kept",
        "--trainer.callbacks.filename={epoch}",
        "--trainer.callbacks.every_n_epochs=10",
        "--trainer.callbacks.save_top_k=-1",
    ]
    run(*TRAIN, *QUICK, epochs, *keep_some, folder=whole)
    version = whole / "runs/digits/version_0"
    assert max(logged(whole, "test_accuracy").values()) > 0.95
    assert list(whole.glob("runs/digits/tensorboard/version_0/events.out.tfevents.*"))
    rates = logged(whole, "lr")
    # 60 steps, a tenth of them warm-up to 0.005 * sqrt(512 / 64), the last one at 1/60 of that
    assert [rates[step] for step in (0, 5, 59)] == pytest.approx([0.0141421 / 6, 0.0141421, 0.0141421 / 60], rel=1e-5)
    assert logged(whole, "trust_ratio/net.0.weight")

    assert (version / "checkpoints/best.ckpt").exists()
    saved = torch.load(version / "checkpoints/last.ckpt", weights_only=True)
    assert saved["callbacks"]["LargeBatch"]["accumulate_grad_batches"] == 4
    run(*TRAIN, *QUICK, epochs, f"--ckpt_path={whole / 'kept/epoch=9.ckpt'}", folder=half)
    resumed = torch.load(half / "runs/digits/version_0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["epoch"] == saved["epoch"] == 19
    for name, value in saved["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def digits_data() -> Any:
    """The example's data module."""
    spec = importlib.util.spec_from_file_location("digits_data", ROOT / "examples/digits/digits_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_mnist(folder: Path, compress: bool) -> None:
    """Four small idx files with MNIST's names."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        for name, shape in (
            (f"{prefix}-images-idx3-ubyte", (count, 28, 28)),
            (f"{prefix}-labels-idx1-ubyte", (count,)),
        ):
            data = generator.integers(0, 10, shape, dtype=np.uint8)
            content = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + data.tobytes()
            (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_mnist_files_are_read_from_a_directory_or_the_environment(tmp_path: Path, compress: bool) -> None:
    write_mnist(tmp_path, compress)
    data = digits_data().DigitsData(str(tmp_path), batch_size=16)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (180, 20, 50)
    images, labels = data.train_set[0]
    assert images.shape == (1, 28, 28)
    assert 0 <= int(labels) < 10


def test_the_environment_variable_names_the_directory(tmp_path: Path) -> None:
    write_mnist(tmp_path, True)
    run(*TRAIN, *QUICK, "--trainer.fast_dev_run=true", folder=tmp_path, LIGHTNING_LAMB_DATA=str(tmp_path))
    missing = run(*TRAIN, *QUICK, folder=tmp_path, check=False, LIGHTNING_LAMB_DATA=str(tmp_path / "nothing"))
    assert "is no directory; it should hold train-images-idx3-ubyte" in missing.stderr
    assert "LIGHTNING_LAMB_DATA" in missing.stderr


def test_a_root_without_the_files_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    data_module = digits_data()
    with pytest.raises(FileNotFoundError, match=r"holds no train-images-idx3-ubyte.*--data\.root"):
        data_module.DigitsData(str(tmp_path)).setup("fit")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09rubbish")
    with pytest.raises(ValueError, match="cut off"):
        data_module.DigitsData(str(tmp_path)).setup("fit")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no idx file"):
        data_module.DigitsData(str(tmp_path)).setup("fit")


@pytest.mark.parametrize("example", ["plain_pytorch.py", "fabric_lamb.py"])
def test_the_short_examples_learn(tmp_path: Path, example: str) -> None:
    output = run(str(ROOT / "examples" / example), folder=tmp_path).stdout
    accuracy = next(line for line in output.splitlines() if "test accuracy" in line)
    assert float(accuracy.split()[-1]) > 0.9


@pytest.mark.skipif("LIGHTNING_LAMB_DATA" not in os.environ, reason="needs MNIST's idx files in LIGHTNING_LAMB_DATA")
@pytest.mark.slow
def test_mnist_trains_too(tmp_path: Path) -> None:
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=160"]
    run(*TRAIN, *QUICK, *limits, folder=tmp_path, LIGHTNING_LAMB_DATA=os.environ["LIGHTNING_LAMB_DATA"])
    assert max(logged(tmp_path, "test_accuracy").values()) > 0.5  # 40 steps: 0.64 measured, and chance is 0.1
