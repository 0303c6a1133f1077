"""The numbers and figures in the docs come from scripts that run and find what the docs say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contenders  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
import sharded_report  # noqa: E402
from lightning_lamb import Lamb  # noqa: E402


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("bert-base", 109_482_240, 199), ("bert-large", 335_141_888, 391), ("resnet50", 25_557_032, 161)],
)
def test_the_shapes_are_those_of_the_published_models(name: str, parameters: int, tensors: int):
    """The totals that transformers' BertModel and torchvision's resnet50 report."""
    model = shapes.parse(name)
    sizes = [1] * len(model)
    for index, shape in enumerate(model):
        for size in shape:
            sizes[index] *= size
    assert (sum(sizes), len(model)) == (parameters, tensors)


def test_shapes_can_be_given_by_size():
    assert shapes.parse("3*10x20") == [(10, 20)] * 3
    assert len(shapes.parse("768x768")) == 76
    with pytest.raises(SystemExit, match="not one of bert-base"):
        shapes.parse("bert-tiny")


def test_a_peer_that_is_not_installed_is_listed_as_such():
    absent = contenders.Contender("nobody's Lamb", "no-such-distribution", lambda params: None)
    assert contenders.reason_not_to_run(absent, "cpu") == "not installed"
    gpu_only = contenders.Contender("GPU only", "torch", lambda params: None, devices=("cuda",))
    assert contenders.reason_not_to_run(gpu_only, "cpu") == "does not run on cpu"


def test_the_benchmark_runs_and_writes_its_numbers(tmp_path: Path):
    options = ["--shapes", "3*100x100", "--threads", "1", "--rounds", "2", "--only", "foreach"]
    files = ["--json", str(tmp_path / "b.json"), "--markdown", str(tmp_path / "b.md")]
    run(str(BENCHMARKS / "step_time.py"), *options, *files)
    (model,) = json.loads((tmp_path / "b.json").read_text())["models"]
    times = {row["name"]: row for row in model["times"]["1"]}
    assert {contenders.BASELINE, f"{contenders.OURS} foreach"} <= set(times)
    assert times[contenders.BASELINE]["ratio"]["median"] == 1
    assert times[f"{contenders.OURS} foreach"]["seconds"]["median"] > 0
    assert f"| {contenders.OURS} foreach |" in (tmp_path / "b.md").read_text()


def test_the_benchmark_page_is_what_its_json_says():
    results = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    assert (ROOT / "docs" / "benchmarks.md").read_text() == report.page(results)


def test_the_sharded_benchmark_runs_and_its_page_is_what_its_json_says(tmp_path: Path):
    options = ["--shapes", "3*10x10", "--ranks", "2", "--rounds", "2"]
    run(str(BENCHMARKS / "sharded_step.py"), *options, "--json", str(tmp_path / "b.json"))
    (model,) = json.loads((tmp_path / "b.json").read_text())["models"]
    assert model["seconds"][sharded_report.TIMM]["median"] > 0
    assert model["seconds"][sharded_report.ALONE]["median"] > 0
    assert model["state_bytes"][sharded_report.OURS] < model["state_bytes"][sharded_report.WHOLE]
    results = json.loads((ROOT / "docs" / "sharded_benchmarks.json").read_text())
    assert (ROOT / "docs" / "sharded_benchmarks.md").read_text() == sharded_report.page(results)


def test_the_cost_of_the_callbacks_is_measured_beside_lightning_alone(tmp_path: Path):
    options = ["--rounds", "1", "--steps", "4", "--accumulation", "2", "--markdown", str(tmp_path / "c.md")]
    run(str(BENCHMARKS / "callback_cost.py"), *options)
    page = (tmp_path / "c.md").read_text()
    rows = re.findall(r"^\| (.+?) \| [\d.]+ \| \*\*([\d.]+)", page, flags=re.MULTILINE)
    assert rows[0] == ("Lightning alone", "1.000")
    assert {"LargeBatch", "TrustRatioMonitor"} <= {name for name, _ in rows}


def test_sharded_training_drifts_as_the_figure_shows(tmp_path: Path):
    """On 2 ranks and few steps: ours by rounding only, an optimizer that is not aware of FSDP1's pieces by far more."""
    script = str(ROOT / "examples" / "figures" / "sharded_error.py")
    run(script, "--ranks", "2", "--steps", "5", "--optimizers", "lightning_lamb", "timm", "--output", str(tmp_path))
    results = json.loads((tmp_path / "sharded_error.json").read_text())["results"]
    assert (tmp_path / "sharded_error.png").stat().st_size > 10_000
    for layout in ("FSDP1", "FSDP2"):
        assert max(results[layout]["lightning_lamb"]["errors"]) < 1e-6
    assert max(results["FSDP1"]["timm"]["errors"]) > 1e-4


def relative_first_step(optimizer_class: type, weight_norm: float, weight_decay: float) -> float:
    """How far a 64x64 layer moves in the first step, in units of lr times its norm; the paper's LAMB: 1."""
    torch.manual_seed(0)
    start = torch.randn(64, 64)
    start *= weight_norm / start.norm()
    param = torch.nn.Parameter(start.clone())
    param.grad = torch.randn(64, 64) * 0.01
    optimizer_class([param], lr=1e-3, weight_decay=weight_decay).step()
    return ((param.detach() - start).norm() / start.norm() / 1e-3).item()


@pytest.mark.parametrize("package", ["lightning_lamb", "timm", "pytorch_optimizer", "torch_optimizer"])
def test_lambs_at_their_defaults_move_a_layer_as_far_as_the_readme_says(package: str):
    (row,) = re.findall(rf"^\| {package} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    said = [float(cell) for cell in row.split("|")[:3]]
    classes = {
        "lightning_lamb": lambda: Lamb,
        "timm": contenders.timm_lamb_class,
        "pytorch_optimizer": lambda: pytest.importorskip("pytorch_optimizer").Lamb,
        "torch_optimizer": lambda: pytest.importorskip("torch_optimizer").Lamb,
    }
    optimizer_class = classes[package]()
    found = [relative_first_step(optimizer_class, *case) for case in ((1.3, 0.01), (1.3, 0.0), (40.0, 0.01))]
    assert found == pytest.approx(said, rel=0.01)
