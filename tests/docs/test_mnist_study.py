"""The repeated MNIST comparison: near the published cells, its page shows its runs, its script is the protocol."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ReferenceLamb

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "mnist_study"))

import mnist_protocol  # noqa: E402
import mnist_tables  # noqa: E402
import study  # noqa: E402

RUNS: list[dict[str, Any]] = json.loads((ROOT / "docs" / "mnist_study.json").read_text(encoding="utf-8"))["runs"]
POINTS = {64: 1.0, 1024: 1.0, 16384: 1.5}
"""What a single run may differ by: three standard errors of an accuracy on 10,000 images, and more with 300 steps."""


@pytest.mark.parametrize("batch", POINTS)
@pytest.mark.parametrize("optimizer", mnist_protocol.OPTIMIZERS)
def test_every_cell_is_near_the_published_one(batch: int, optimizer: str):
    wanted = (batch, optimizer, "MLP")
    runs = [
        run
        for run in RUNS
        if mnist_tables.is_protocol(run) and (run["batch"], run["optimizer"], run["model"]) == wanted
    ]
    assert runs
    for run in runs:
        assert run["steps"] == 100 * (55_000 // batch)
        assert abs(run["accuracy"] - mnist_protocol.published()[wanted]) <= POINTS[batch]


def test_the_page_shows_the_tables_of_the_runs():
    page = (ROOT / "docs" / "mnist_study.md").read_text(encoding="utf-8")
    for table in mnist_tables.tables(RUNS).split("\n\n"):
        assert table in page


def test_the_lamb_of_the_study_is_the_published_one():
    """Every tensor decayed and adapted, biases too; no bias correction."""
    weights = {"weight": torch.randn(5, 3), "bias": torch.randn(5)}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = mnist_protocol.optimizer_named("LAMB", parameters.items(), 1e-3)
    reference = ReferenceLamb(
        {name: value.double().numpy() for name, value in weights.items()},
        lr=1e-3,
        weight_decay=0.01,
        bias_correction=False,
        exempt_1d=False,
    )
    for _ in range(5):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        reference.step({name: p.grad.double().numpy() for name, p in parameters.items()})
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            parameter.detach().double(), torch.from_numpy(reference.weights[name]), rtol=1e-5, atol=1e-6
        )


def test_the_adamw_of_the_study_is_adam_without_bias_correction():
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = mnist_protocol.optimizer_named("AdamW", [("weight", parameter)], 1e-3)
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()  # m = 0.2, v = 0.004
    torch.testing.assert_close(
        parameter.detach(), torch.full((4, 3), -1e-3 * 0.2 / (0.004**0.5 + 1e-6)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("optimizer", mnist_protocol.OPTIMIZERS)
def test_a_run_trains_and_records_its_setting(optimizer: str, monkeypatch: pytest.MonkeyPatch):
    """30 steps, on made-up images whose brightest pixel is their class."""
    monkeypatch.setattr(study, "EPOCHS", 1)
    monkeypatch.setattr(study, "steps_per_epoch", lambda _: 30)
    labels = torch.arange(2000) % 10
    images = torch.nn.functional.one_hot(labels, 784).float()
    setting = study.Run("MLP", 256, optimizer, init="fan_in", lr=0.01, seed=3)
    result = study.train(setting, (images, labels, images[:500], labels[:500]))
    assert study.identity(result) == setting
    assert result["steps"] == 30
    assert result["accuracy"] == result["curve"][1] > 50.0


def test_batches_reach_over_the_end_of_a_pass_and_shuffle_each():
    images, labels = torch.arange(10.0).reshape(10, 1), torch.arange(10)
    drawn = [labels.clone() for _, labels in mnist_protocol.batches(images, labels, 4, 5, seed=0)]
    passes = torch.cat(drawn).reshape(2, 10)
    assert [sorted(one) for one in passes.tolist()] == [list(range(10))] * 2
    assert passes[0].tolist() != passes[1].tolist() != list(range(10))
