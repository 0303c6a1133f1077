"""The configs and the example run as they are, by ``python`` and by DeepSpeed's launcher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from distributed import _free_port
from zero_setting import on_ranks

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
EXAMPLE = str(ROOT / "examples" / "deepspeed" / "train.py")


@pytest.fixture(scope="module", params=["gloo", pytest.param("shared memory", marks=pytest.mark.slow)])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A user's environment, once without the collectives in shared memory that DeepSpeed compiles for a minute."""
    folder = tmp_path_factory.mktemp("environment")
    if request.param == "gloo":
        switch = 'import deepspeed\n\ndeepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False\n'
        (folder / "sitecustomize.py").write_text(switch)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def run(command: list[str], environment: dict[str, str]) -> str:
    before = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
        )
    finally:
        for leftover in set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) - before:
            leftover.unlink(missing_ok=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    if EXAMPLE in command:
        compiled = "deepspeed_shm_comm_op built" in done.stdout
        assert compiled == (not Path(environment["PYTHONPATH"].split(os.pathsep)[0], "sitecustomize.py").exists())
    return done.stdout


def accuracy(output: str) -> float:
    found = re.search(r"test accuracy (\d\.\d+)", output)
    assert found, output[-2000:]
    return float(found[1])


def test_there_is_a_config_per_stage_and_offload():
    assert [path.stem for path in CONFIGS] == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for path in CONFIGS:
        config = json.loads(path.read_text())
        assert config["zero_optimization"]["stage"] == int(path.stem[4])
        assert ("offload_optimizer" in config["zero_optimization"]) == path.stem.endswith("offload")


def run_example(configs: list[str]) -> dict[str, str]:
    """Worker: the example's output with each config."""
    found = {}
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed would keep the old groups for the next config
    for config in configs:
        sys.argv = [EXAMPLE, "--config", config, "--epochs", "4"]
        with contextlib.redirect_stdout(io.StringIO()) as output:
            runpy.run_path(EXAMPLE, run_name="__main__")
        found[config] = output.getvalue()
    return found


def test_the_example_trains_with_every_config_on_two_ranks():
    for config, output in on_ranks(run_example, 2, [str(config) for config in CONFIGS])[0].items():
        assert accuracy(output) > 0.7, config
        assert "steps 88 " in output, config


def test_the_example_trains_from_python(environment):
    output = run([sys.executable, EXAMPLE, "--config", str(CONFIGS[1]), "--epochs", "4"], environment)
    assert accuracy(output) > 0.8
    assert "steps 176 " in output


def test_the_example_trains_with_the_launcher_on_two_ranks_saves_and_resumes(environment, tmp_path):
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    assert launcher, "DeepSpeed is installed without its launcher"
    command = [launcher, "--num_gpus", "2", "--master_port", str(_free_port()), EXAMPLE]
    command += ["--config", str(ROOT / "configs/deepspeed/zero2.json"), "--save", str(tmp_path / "saved")]
    assert accuracy(run([*command, "--epochs", "4"], environment)) > 0.7
    output = run([*command, "--epochs", "1", "--resume", str(tmp_path / "saved")], environment)
    assert "steps 110" in output  # 4 epochs of 22 and one more


@pytest.mark.slow
def test_a_rank_holds_what_the_plan_says(environment):
    script = str(ROOT / "examples/deepspeed/memory_per_rank.py")
    output = run([sys.executable, script, "--ranks", "2", "--width", "512", "--layers", "8"], environment)
    rows = re.findall(r"stage (\d).*plan (\d+) MiB, tensors (\d+) MiB, process (\d+) MiB", output)
    plan, tensors, process = ({int(row[0]): int(row[column]) for row in rows} for column in (1, 2, 3))
    assert sorted(plan) == [0, 1, 2, 3]
    for stage, held in tensors.items():  # at stage 1 the plan counts whole gradients, as while accumulating
        assert held == pytest.approx(plan[2 if stage == 1 else stage], abs=2), "more than a layer and its rounding"
        assert process[stage] >= held - 2
