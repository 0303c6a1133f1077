"""The BERT example's model against transformers' own losses, its checks, and the sizes in its configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from example_scripts import ROOT, module
from lightning.pytorch import Trainer
from transformers import BertForPreTraining

from lightning_lamb import Lamb, plan_from_recipe
from lightning_lamb.callbacks.windows import REPORT
from lightning_lamb.recipes import BERT_LARGE_MIXED

bert_data = module("bert", "bert_data")
bert_model = module("bert", "bert_model")

LARGE = sorted((ROOT / "configs").glob("bert-large-*.yaml"))
SMALL: dict[str, Any] = {"vocabulary_size": 300, "hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs in which words follow each other regularly."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    paragraphs = [
        " ".join(f"{' '.join(words[start:] + words[:start])} {number}." for start in range(4)).capitalize()
        for number in range(400)
    ]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture
def data(text: Path, tmp_path_factory: pytest.TempPathFactory):
    made = bert_data.BertData(
        str(text), 16, 32, vocabulary_size=300, cache=str(tmp_path_factory.getbasetemp() / "vocabulary")
    )
    made.setup("fit")
    return made


def small_model(**options: Any):
    model = bert_model.BertPretraining(**(SMALL | {"dropout": 0.0, "max_sequence_length": 64} | options))
    model.configure_model()
    return model


def test_the_losses_are_those_of_transformers(data):
    """Ours looks at masked positions only; theirs at all of them, ignoring the others."""
    model = small_model()
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        mlm, nsp = model(batch).losses()
        theirs = BertForPreTraining.forward(model.net, **batch)
    assert float(theirs.loss) == pytest.approx(float(mlm + nsp), rel=1e-5)


def test_a_step_reports_its_masked_tokens(data):
    model = small_model()
    model.log = lambda *args, **options: None
    batch = next(iter(data.train_dataloader()))
    model.training_step(batch, 0)
    assert getattr(model, REPORT) == int((batch["labels"] != -100).sum()) > 0


def test_recomputed_activations_change_nothing(data):
    batch = next(iter(data.train_dataloader()))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = small_model(checkpoint_activations=recompute)
        sum(model(batch).losses()).backward()
        gradients.append([parameter.grad for parameter in model.net.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def quiet_trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**(quiet | {"enable_model_summary": False} | options))


def test_it_learns_regular_text_and_reports_the_entropy_beside_it(data):
    model = small_model()
    model.configure_optimizers = lambda: Lamb(model.named_parameters(), lr=0.02)
    data.steps_per_epoch = 70
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(model, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert found["unigram_entropy"] == pytest.approx(data.unigram_entropy)
    assert found["val_mlm_loss"] < found["unigram_entropy"] - 0.2
    assert 0.15 < found["val_mlm_accuracy"] <= 1
    assert found["sequence_length"] == 32


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"vocabulary_size": 50}, 32, r"model\.vocabulary_size=50, but the data has \d+ word pieces"),
        ({"max_sequence_length": 16}, 32, r"sequence_length=32 is more than model\.max_sequence_length=16"),
    ],
)
def test_data_that_the_model_cannot_take_is_refused_before_the_first_step(data, options, length, message):
    model = small_model(**options)
    model.configure_optimizers = lambda: Lamb(model.named_parameters())
    data.sequence_length = length
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_steps=1).fit(model, data)


# ---- the configs of BERT-Large


def test_there_is_a_config_for_each_strategy_and_nothing_else_differs():
    strategies = {}
    for path in LARGE:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        strategies[path.stem.removeprefix("bert-large-")] = config["trainer"].pop("strategy")
        assert config == yaml.safe_load(LARGE[0].read_text(encoding="utf-8")) | {"trainer": config["trainer"]}
    assert strategies["ddp"] == "ddp"
    assert strategies["fsdp2"]["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    assert strategies["deepspeed"]["class_path"] == "lightning_lamb.deepspeed.LambDeepSpeedStrategy"
    assert len(strategies) == 3


@pytest.mark.parametrize("gpus", [8, 16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_config_of_bert_large_is_the_plan_of_the_paper(path: Path, gpus: int):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    (batch,) = [c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith("LargeBatch")]
    plan = plan_from_recipe(
        "bert-large-mixed",
        micro_batch_size=[stage["micro_batch_size"] for stage in batch["stages"]],
        data_parallel_size=gpus,
    )
    assert (batch["base_batch_size"], batch["base_lr"]) == (BERT_LARGE_MIXED.base_batch_size, BERT_LARGE_MIXED.base_lr)
    assert config["optimizer"]["init_args"]["lr"] == batch["base_lr"]
    for stage, planned in zip(batch["stages"], plan.stages, strict=True):
        assert stage["steps"] == planned.total_steps
        assert stage["steps"] % stage["data"]["steps_per_epoch"] == 0
        assert stage["global_batch_size"] == planned.global_batch_size
        assert stage["warmup_steps"] == planned.warmup_steps
        assert stage["data"]["sequence_length"] == planned.sequence_length
    assert plan.total_steps == 8599


def test_the_model_of_the_config_is_bert_large():
    options = yaml.safe_load(LARGE[0].read_text(encoding="utf-8"))["model"]
    with torch.device("meta"):
        model = bert_model.BertPretraining(**options)
        model.configure_model()
    parameters = list(model.net.parameters())
    assert sum(parameter.numel() for parameter in parameters) == BERT_LARGE_MIXED.parameters
    assert sum(parameter.ndim > 1 for parameter in parameters) == BERT_LARGE_MIXED.layers
