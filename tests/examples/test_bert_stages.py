"""BERT in two stages: what is logged per step is the plan, resumed runs continue bit for bit, and the loss falls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from example_scripts import ROOT, module, run
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.callbacks import ThroughputMonitor
from lightning_lamb.errors import InvalidOptionError

bert_data = module("bert", "bert_data")
bert_model = module("bert", "bert_model")
plot = module("bert", "plot")

CONFIG = ROOT / "configs" / "bert-tiny.yaml"
BASE_BATCH, BASE_LR = 16, 0.02
STAGES: list[dict[str, Any]] = [
    {"steps": 6, "global_batch_size": 16, "micro_batch_size": 4, "warmup_steps": 2, "data": {"sequence_length": 16}},
    {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "warmup_steps": 2, "data": {"sequence_length": 48}},
]


def planned(stages: list[dict[str, Any]], base_batch: int, base_lr: float) -> list[tuple[float, float, float]]:
    """Samples, sequence length and learning rate of every step, by the formulas of the paper alone."""
    rows = []
    for stage in stages:
        steps, batch = stage["steps"], stage["global_batch_size"]
        warmup = stage.get("warmup_steps") or round(stage.get("warmup_fraction", 0) * steps)
        peak = base_lr * math.sqrt(batch / base_batch)
        for done in range(steps):
            lr = peak * (done + 1) / warmup if done < warmup else peak * (1 - done / steps)
            rows.append((batch, stage["data"]["sequence_length"], lr))
    return rows


def logged(path: Path) -> list[tuple[float, float, float]]:
    """The same from metrics.csv."""
    columns = plot.curves(path)
    (lr,) = (column for name, column in columns.items() if name == "lr" or name.startswith("lr-"))
    steps = sorted(columns["samples_per_step"])
    assert steps == list(range(len(steps)))
    return [(columns["samples_per_step"][step], columns["sequence_length"][step], lr[step]) for step in steps]


def assert_is_the_plan(found: list[tuple[float, float, float]], plan: list[tuple[float, float, float]]) -> None:
    """Batches and lengths are equal, learning rates up to how a CSV and float32 metrics print them."""
    assert [row[:2] for row in found] == [row[:2] for row in plan]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in plan], rel=1e-6)


# ---- a short run of a small model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["north", "east", "south", "west", "up", "down"]
    paragraphs = [
        " ".join(
            f"Turn {number % 7} goes {words[(number + part) % 6]} and {words[(number * part) % 6]}."
            for part in range(9)
        )
        + f" End of number {number}."
        for number in range(120)
    ]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


class EveryMicroBatch(Callback):
    """Saves after every micro-batch, counted over the whole training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        trainer.save_checkpoint(self.folder / f"{done}.ckpt")


class Run:
    """One training of a small BERT; what it logs and saves is in ``folder``."""

    def __init__(self, text: Path, folder: Path, stages: list[dict[str, Any]] = STAGES, **options: Any) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32, "max_sequence_length": 48}
        self.model = bert_model.BertPretraining(vocabulary_size=200, dropout=0.1, **sizes)
        self.model.configure_optimizers = lambda: Lamb(self.model.named_parameters(), lr=BASE_LR)
        self.data = bert_data.BertData(str(text), vocabulary_size=200, steps_per_epoch=2, cache=str(text.parent))
        self.folder = folder
        self.trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=CSVLogger(folder, name=None, version=""),
            callbacks=[
                LargeBatch(stages=stages, base_batch_size=BASE_BATCH, base_lr=BASE_LR),
                ThroughputMonitor(tokens="input_ids"),
                LearningRateMonitor("step"),
                EveryMicroBatch(folder),
            ],
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )

    def fit(self, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        self.trainer.fit(self.model, self.data, ckpt_path=ckpt_path)
        return self.model.state_dict()


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, Run(text, folder).fit()


def test_logged_batch_length_and_learning_rate_are_the_plan_at_every_step(whole):
    folder, _ = whole
    assert_is_the_plan(logged(folder / "metrics.csv"), planned(STAGES, BASE_BATCH, BASE_LR))


def test_both_stages_are_validated_at_their_own_sequence_length(whole):
    folder, _ = whole
    columns = plot.curves(folder / "metrics.csv")
    assert sorted(columns["val_mlm_loss"]) == [1, 3, 5, 7, 9]
    rows = plot.summary(columns)["stages"]
    assert [(row["first"], row["last"], row["samples"], row["sequence_length"]) for row in rows] == [
        (0, 5, 16, 16),
        (6, 9, 8, 48),
    ]


# Micro-batches: stage 1 has 6 windows of 4, so 24 is the switch; stage 2 has 4 windows of 4.
@pytest.mark.parametrize("done", [2, 7, 20, 23, 24, 25, 33])
def test_a_run_resumed_at_a_micro_batch_ends_bit_for_bit_like_the_whole_one(whole, text, tmp_path, done):
    """Data order, masks, dropout, accumulation, learning rate and moments, also inside windows."""
    folder, expected = whole
    resumed = Run(text, tmp_path).fit(folder / f"{done}.ckpt")
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_a_run_that_is_killed_again_before_its_first_window_is_full_continues_too(whole, text, tmp_path):
    """A checkpoint from inside the first window after a resume still knows where the stream of samples is."""
    folder, expected = whole
    Run(text, tmp_path / "first").fit(folder / "14.ckpt")
    resumed = Run(text, tmp_path / "second").fit(tmp_path / "first" / "14.ckpt")
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_a_stage_that_the_model_or_the_data_cannot_take_is_refused_before_the_first(text, tmp_path):
    longer = [STAGES[0], STAGES[1] | {"data": {"sequence_length": 64}}]
    with pytest.raises(InvalidOptionError, match=r"stages\[1\].*sequence_length=64.*max_position_embeddings=48"):
        Run(text, tmp_path / "a", longer).fit()
    unknown = [STAGES[0] | {"data": {"length": 16}}, STAGES[1]]
    with pytest.raises(InvalidOptionError, match=r"stages\[0\]\.data: BertData has no attribute.*'length'"):
        Run(text, tmp_path / "b", unknown).fit()


def test_the_figure_and_its_numbers_come_from_the_log(whole, tmp_path):
    folder, _ = whole
    found = plot.curves(folder / "metrics.csv")
    found["trust_ratio/net.bert.encoder.layer.0.attention.self.query.weight"] = {0: 1.0, 5: 2.0}
    plot.figure(found, tmp_path / "stages.png")
    assert (tmp_path / "stages.png").stat().st_size > 20_000
    assert plot.summary(found)["unigram_entropy"] > 1


# ---- the config


def config() -> dict[str, Any]:
    loaded = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    (batch,) = [c["init_args"] for c in loaded["trainer"]["callbacks"] if c["class_path"].endswith("LargeBatch")]
    return batch


def test_the_stages_of_bert_tiny_end_with_a_validation():
    first, second = config()["stages"]
    assert all(stage["steps"] % stage["data"]["steps_per_epoch"] == 0 for stage in (first, second))
    assert second["global_batch_size"] == first["global_batch_size"] // 2
    assert second["data"]["sequence_length"] == 4 * first["data"]["sequence_length"]


def test_the_committed_figure_is_of_a_run_that_did_what_the_page_says():
    numbers = json.loads((ROOT / "docs" / "figures" / "bert_stages.json").read_text(encoding="utf-8"))
    assert [stage["samples"] for stage in numbers["stages"]] == [
        stage["global_batch_size"] for stage in config()["stages"]
    ]
    assert all(stage["val_mlm_loss"] < numbers["unigram_entropy"] for stage in numbers["stages"])
    page = (ROOT / "docs" / "bert.md").read_text(encoding="utf-8")
    for stage in numbers["stages"]:
        assert f"{stage['val_mlm_loss']:.2f}" in page
    assert f"{numbers['unigram_entropy']:.2f}" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bert_tiny_follows_its_plan_and_falls_below_the_unigram_entropy_in_both_stages(tmp_path: Path):
    script = str(ROOT / "examples" / "bert" / "train.py")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    run(script, "fit", "--config", str(CONFIG), *quiet, folder=tmp_path, timeout=850)
    metrics = tmp_path / "runs" / "bert" / "version_0" / "metrics.csv"
    batch = config()
    assert_is_the_plan(logged(metrics), planned(batch["stages"], batch["base_batch_size"], batch["base_lr"]))
    numbers = plot.summary(plot.curves(metrics))
    assert len(numbers["stages"]) == 2
    for stage in numbers["stages"]:
        assert stage["val_mlm_loss"] < numbers["unigram_entropy"]
    run(str(ROOT / "examples" / "bert" / "plot.py"), str(metrics), "--output", "stages.png", folder=tmp_path)
    assert (tmp_path / "stages.png").stat().st_size > 50_000


# ---- the configs of BERT-Large, made small


def shrunk(path: Path, text: Path) -> dict[str, Any]:
    """A config of BERT-Large with its strategy and callbacks, for two CPU ranks: smaller numbers, nothing else."""
    small = yaml.safe_load(path.read_text(encoding="utf-8"))
    small["model"] |= {"vocabulary_size": 200, "hidden_size": 16, "layers": 2, "heads": 2, "intermediate_size": 32}
    small["data"] |= {"vocabulary_size": 200, "text": str(text), "num_workers": 0, "cache": str(text.parent)}
    small["trainer"] |= {"accelerator": "cpu", "devices": 2, "precision": "32-true", "enable_progress_bar": False}
    small["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs"},
    }
    strategy = small["trainer"]["strategy"]
    if "data_parallel_size" in (strategy.get("init_args", {}) if isinstance(strategy, dict) else {}):
        strategy["init_args"]["data_parallel_size"] = 2
    batch = small["trainer"]["callbacks"][0]["init_args"]
    batch |= {"base_batch_size": BASE_BATCH, "base_lr": BASE_LR}
    for stage, smaller in zip(batch["stages"], STAGES, strict=True):
        stage |= {name: smaller[name] for name in ("steps", "global_batch_size", "micro_batch_size", "warmup_steps")}
        stage["data"] |= {"steps_per_epoch": 2} | smaller["data"]
    small["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"] = 4
    return small


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed"])
def test_the_strategies_of_bert_large_train_both_stages_on_two_ranks(strategy: str, text: Path, tmp_path: Path):
    if strategy == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    config = shrunk(ROOT / "configs" / f"bert-large-{strategy}.yaml", text)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    script = str(ROOT / "examples" / "bert" / "train.py")
    run(script, "fit", "--config", "small.yaml", folder=tmp_path, DS_ACCELERATOR="cpu")
    (metrics,) = tmp_path.glob("runs/lightning_logs/version_*/metrics.csv")
    assert_is_the_plan(logged(metrics), planned(STAGES, BASE_BATCH, BASE_LR))
    assert sorted(plot.curves(metrics)["val_mlm_loss"]) == [1, 3, 5, 7, 9]
    assert len(list(tmp_path.glob("runs/lightning_logs/version_*/checkpoints/*"))) >= 2
