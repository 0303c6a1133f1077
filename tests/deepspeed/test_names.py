"""Names of layers under DeepSpeed, where the optimizer came without any."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import Layers, ds_config, made_engine, named, on_ranks, train

from lightning_lamb import Lamb

CASES = ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"))


def run_unnamed() -> dict[str, list[str]]:
    """The names of trust ratios, per stage and precision."""
    found = {}
    for stage, dtype in CASES:
        model = Layers()
        optimizer = Lamb([parameter for _, parameter in named(model)])
        engine = made_engine(model, ds_config(stage, dtype), optimizer=optimizer)
        train(engine, [0, 1])
        found[f"{stage} {dtype}"] = sorted(optimizer.trust_ratios)
        engine.destroy()
    return found


def test_an_optimizer_without_names_learns_those_of_the_engines_module():
    """``deepspeed.initialize(optimizer=Lamb(model.parameters()))``, as Hugging Face's Trainer does: ratios were called
    group0.param0 although the engine has the module."""
    (found,) = on_ranks(run_unnamed, 1)
    known = {name for name, parameter in Layers().named_parameters() if parameter.dim() > 1}
    for stage, names in found.items():
        assert names, stage
        assert set(names) <= known, stage
