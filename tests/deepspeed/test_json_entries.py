"""``{"type": "LightningLamb"}`` and ``{"type": "StagedWarmup"}`` in DeepSpeed configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import (
    LR,
    DeepSpeedClippedLamb,
    DeepSpeedClippedLars,
    Layers,
    ds_config,
    full_precision,
    largest_error,
    made_engine,
    named,
    on_ranks,
    prescribed,
    start_weights,
    train,
)

from lightning_lamb import Lamb, Lars, StagedWarmup
from lightning_lamb.deepspeed import lamb_is_ours
from lightning_lamb.deepspeed.config import (
    load_config,
    refuse_double_clipping,
    refuse_fused_lamb,
    refuse_half_without_zero,
    refuse_other_batch,
)
from lightning_lamb.deepspeed.json_entries import lightning_lamb, lightning_lars
from lightning_lamb.deepspeed.versions import refuse_untested
from lightning_lamb.errors import BatchSizeError, ConflictError, InvalidOptionError, MissingDependencyError
from lightning_lamb.stages import Stage, multiplier
from tests.docs.markdown_blocks import all_blocks

STAGES = [
    {"steps": 6, "warmup_steps": 2, "lr": 0.01},
    {"steps": 4, "warmup_steps": 2, "lr": 0.005},
]
RATES = [0.005, 0.01, 0.01 * 4 / 6, 0.005, 0.01 * 2 / 6, 0.01 / 6, 0.0025, 0.005, 0.0025, 0.00125]


def entry(kind: str = "LightningLamb", **params: Any) -> dict[str, Any]:
    return {"type": kind, "params": {"lr": LR, "weight_decay": 0.01, **params}}


def run_entries(cases: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    import lightning_lamb.deepspeed  # noqa: F401 - what makes the names known

    results = []
    for index, one in enumerate(cases):
        model = Layers()
        config = ds_config(one["stage"], one["dtype"], optimizer=one["optimizer"], scheduler=one["scheduler"])
        del config["zero_allow_untested_optimizer"]
        if one.get("ours"):
            config = lamb_is_ours(config)
        if one.get("file"):
            path = Path(folder) / f"{index}-{torch.distributed.is_initialized()}-{id(model)}.json"
            path.write_text(json.dumps(config))
            config = str(path)
        parameters: Any = [p for _, p in named(model)]
        if one.get("groups"):
            parameters = [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ]
        engine = made_engine(model, config, model_parameters=parameters)
        rates = []
        for step in range(10):
            rates.append(engine.get_lr()[0])
            train(engine, [step])
        kind = type(engine.basic_optimizer).__name__
        results.append({"weights": full_precision(engine), "rates": rates, "kind": kind})
        engine.destroy()
    return results


def test_json_entries_train_exactly_in_every_stage_from_dict_and_file(tmp_path):
    scheduler = {"type": "StagedWarmup", "params": {"stages": STAGES}}
    cases = [
        {"stage": stage, "dtype": dtype, "optimizer": entry(), "scheduler": scheduler}
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
    ]
    cases += [
        {"stage": 2, "dtype": "bf16", "optimizer": entry(), "scheduler": scheduler, "file": True},
        {"stage": 2, "dtype": "fp32", "optimizer": entry(), "scheduler": scheduler, "groups": True},
        {"stage": 3, "dtype": "bf16", "optimizer": entry("Lamb"), "scheduler": scheduler, "ours": True},
        {"stage": 1, "dtype": "bf16", "optimizer": entry("LightningLars"), "scheduler": scheduler},
    ]
    expected = {}
    for kind, build in (("Lamb", DeepSpeedClippedLamb), ("Lars", DeepSpeedClippedLars)):
        reference = build(start_weights(), lr=LR, weight_decay=0.01)
        for step, rate in enumerate(RATES):
            reference.step({name: prescribed(name, step).double().numpy() for name in start_weights()}, lr=rate)
        expected[kind] = reference.weights
    for one, found in zip(cases, on_ranks(run_entries, 2, cases, str(tmp_path))[0], strict=True):
        assert found["rates"] == pytest.approx(RATES), one
        assert found["kind"] == ("Lars" if one["optimizer"]["type"].endswith("Lars") else "Lamb"), one
        assert largest_error(found["weights"], expected[found["kind"]]) <= 2e-6, one


def run_pages(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Worker: a window of micro-batches with each config, as it stands in the docs."""
    found = {}
    for page, config in configs.items():
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
        engine = made_engine(model, config, model_parameters=model.parameters())
        before = full_precision(engine)
        for _ in range(engine.gradient_accumulation_steps()):
            inputs = torch.randn(engine.train_micro_batch_size_per_gpu(), 8).to(next(model.parameters()).dtype)
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
        moved = largest_error(full_precision(engine), before)
        found[page] = type(engine.basic_optimizer).__name__, type(engine.lr_scheduler).__name__, moved
        engine.destroy()
    return found


def test_the_configs_in_the_docs_train_as_they_stand():
    configs = {str(block): json.loads(block.code) for block in all_blocks("json")}
    configs = {page: config for page, config in configs.items() if "optimizer" in config}
    assert len(configs) >= 2
    for page, (optimizer, scheduler, moved) in on_ranks(run_pages, 1, configs)[0].items():
        assert (optimizer, scheduler) == ("Lamb", "StagedWarmup"), page
        assert 0 < moved < 0.1, page


def run_unnamed_and_unsupported() -> dict[str, Any]:
    import lightning_lamb.deepspeed  # noqa: F401 - what makes the names known

    found: dict[str, Any] = {}
    for stage in (1, 3):
        model = Layers()
        engine = made_engine(
            model,
            ds_config(stage, "bf16", optimizer=entry()),
            model_parameters=[p for _, p in named(model)],
        )
        train(engine, [0])
        found[f"names at stage {stage}"] = sorted(engine.basic_optimizer.trust_ratios)
        engine.destroy()
    for option, value in (("state_dtype", "bfloat16"), ("capturable", True), ("differentiable", True)):
        model = Layers()
        try:
            made_engine(
                model,
                ds_config(2, "bf16", optimizer=entry(**{option: value})),
                model_parameters=[p for _, p in named(model)],
            )
            found[option] = "no error"
        except Exception as error:  # noqa: BLE001 - its text is the result
            found[option] = f"{type(error).__name__}: {error}"
    model = Layers()
    engine = made_engine(
        model,
        ds_config(0, "fp32", optimizer=entry(state_dtype="bfloat16")),
        model_parameters=[p for _, p in named(model)],
    )
    train(engine, [0])
    states = engine.basic_optimizer.state.values()
    found["obeyed"] = {str(state["exp_avg"].dtype) for state in states if "exp_avg" in state}
    engine.destroy()
    return found


def test_a_json_entry_knows_the_modules_names_and_refuses_at_once_what_cannot_hold():
    """Hugging Face's Trainer hands over parameters without names: ratios were called group0.param0. ``state_dtype`` was
    ignored."""
    (found,) = on_ranks(run_unnamed_and_unsupported, 1)
    names = sorted(name for name, _ in Layers().named_parameters() if name.endswith(".w") and "layers" in name)
    for stage in (1, 3):
        assert set(found[f"names at stage {stage}"]) <= set(names), found
        assert found[f"names at stage {stage}"], found
    for option in ("state_dtype", "capturable", "differentiable"):
        assert found[option].startswith(f"InvalidOptionError: {option}="), found[option]
        assert "under DeepSpeed" in found[option]
    assert found["obeyed"] == {"torch.bfloat16"}  # float32 at stage 0: the tensors are the optimizer's own


def test_the_rates_above_are_the_schedule():
    stages = [Stage(**stage) for stage in STAGES]
    peak = [0.01] * 6 + [0.005] * 4
    assert [multiplier([Stage(6, 2), Stage(4, 2)], step) * peak[step] for step in range(10)] == pytest.approx(RATES)
    assert len(stages) == 2


def a_parameter() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


def test_coefficients_of_fused_lamb_become_trust_ratio_bounds():
    assert lightning_lamb(a_parameter(), lr=0.1, max_coeff=5.0, min_coeff=0.5).defaults["trust_ratio_bounds"] == (
        0.5,
        5.0,
    )
    assert lightning_lamb(a_parameter(), max_coeff=5.0).defaults["trust_ratio_bounds"] == (0.01, 5.0)
    assert lightning_lars(a_parameter(), min_coeff=0.1).defaults["trust_ratio_bounds"] == (0.1, 10.0)
    assert isinstance(lightning_lamb(a_parameter(), eps_inside_sqrt=False, amsgrad=False), Lamb)
    assert isinstance(lightning_lars(a_parameter(), momentum=0.8), Lars)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_coeff": 5.0, "trust_ratio_bounds": [0, 1]}, "both bound the trust ratio"),
        ({"eps_inside_sqrt": True}, "eps_inside_sqrt"),
        ({"amsgrad": True}, "amsgrad"),
        ({"weight_dcay": 0.1}, "Did you mean 'weight_decay'"),
        ({"lr": "1e-3"}, "lr"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(InvalidOptionError, match=message):
        lightning_lamb(a_parameter(), **options)


def test_a_misspelt_option_of_the_schedule_is_refused():
    scheduler = torch.optim.lr_scheduler.StagedWarmup  # where DeepSpeed looks for it
    optimizer = Lamb(a_parameter())
    assert isinstance(scheduler(optimizer, total_steps=10, warmup_steps=2), StagedWarmup)
    with pytest.raises(InvalidOptionError, match=r'"scheduler" in .*config.*Did you mean .warmup_steps'):
        scheduler(optimizer, total_steps=10, warm_steps=2)


def test_the_switch_changes_lamb_and_nothing_else(tmp_path):
    config = {"optimizer": {"type": "Lamb", "params": {"lr": 1.0}}, "bf16": {"enabled": True}}
    assert lamb_is_ours(config) == {**config, "optimizer": {"type": "LightningLamb", "params": {"lr": 1.0}}}
    assert config["optimizer"]["type"] == "Lamb", "the argument was modified"
    adam = {"optimizer": {"type": "AdamW", "params": {}}}
    assert lamb_is_ours(adam) == adam
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert lamb_is_ours(path) == lamb_is_ours(str(path)) == lamb_is_ours(config)


def test_configs_that_contradict_themselves_are_refused(tmp_path):
    with pytest.raises(ConflictError, match='"type": "LightningLamb"'):
        refuse_fused_lamb({"optimizer": {"type": "lamb"}})
    refuse_fused_lamb({"optimizer": {"type": "LightningLamb"}})
    refuse_fused_lamb({})
    both = {"gradient_clipping": 1.0, "optimizer": {"type": "LightningLamb", "params": {"max_grad_norm": 1.0}}}
    with pytest.raises(ConflictError, match="clipped twice"):
        refuse_double_clipping(both)
    with pytest.raises(ConflictError, match="clipped twice"):
        refuse_double_clipping({"gradient_clipping": 1.0}, max_grad_norm=2.0)
    refuse_double_clipping({"gradient_clipping": 0.0}, max_grad_norm=2.0)
    with pytest.raises(ConflictError, match="stage 0"):
        refuse_half_without_zero({"fp16": {"enabled": True}})
    refuse_half_without_zero({"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    refuse_half_without_zero({"bf16": {"enabled": True}})
    with pytest.raises(BatchSizeError, match="train_batch_size"):
        refuse_other_batch({"train_batch_size": 64}, 128, None)
    with pytest.raises(BatchSizeError, match="train_micro_batch_size_per_gpu"):
        refuse_other_batch({"train_micro_batch_size_per_gpu": 8}, 128, 16)
    refuse_other_batch({"train_batch_size": 128, "train_micro_batch_size_per_gpu": 16}, 128, 16)
    with pytest.raises(InvalidOptionError, match="no such file"):
        load_config(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InvalidOptionError, match="not JSON"):
        load_config(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InvalidOptionError, match="not a DeepSpeed config"):
        load_config(tmp_path / "list.json")


@pytest.mark.parametrize("version", ["0.14.5", "0.18.9", "0.19.0", "0.20.0", "1.0"])
def test_versions_that_were_not_tested_are_refused(version):
    with pytest.raises(MissingDependencyError, match=r"pip install .deepspeed>=0\.19\.8,<0\.20"):
        refuse_untested(version)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9+cpu"])
def test_tested_versions_are_not(version):
    refuse_untested(version)
