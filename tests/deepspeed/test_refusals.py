"""Set-ups under DeepSpeed that are refused, on every rank and before the first update."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import (
    LR,
    Layers,
    ds_config,
    full_precision,
    largest_error,
    made_engine,
    named,
    on_ranks,
    start_weights,
)

from lightning_lamb import Lamb


def refusal(case: str, stage: int) -> str:
    """The message, after checking that nothing was updated."""
    model = Layers()
    options: dict[str, Any] = {}
    config = ds_config(stage, "bf16")
    if case == "max_grad_norm":
        options["max_grad_norm"] = 1.0
        config["gradient_clipping"] = 1.0
    if case == "capturable":
        options["capturable"] = True
    layers = named(model)
    if case == "another order" and os.environ["RANK"] == "1":
        layers.reverse()
    optimizer = Lamb(layers, lr=LR, **options)
    victim = model.layers["fc"].w
    try:
        engine = made_engine(model, config, optimizer=optimizer)
        engine.backward(engine(0))
    except Exception as error:  # noqa: BLE001 - its text is the result
        return f"{type(error).__name__}: {error}"
    before = full_precision(engine)
    mend = broken(case, engine, victim)
    try:
        engine.step()
    except Exception as error:  # noqa: BLE001
        mend()
        assert largest_error(full_precision(engine), before) == 0.0, f"{case}: updated before it was refused"
        return f"{type(error).__name__}: {error}"
    finally:
        mend()
        engine.destroy()
    return "no error"


def broken(case: str, engine: Any, victim: torch.nn.Parameter) -> Callable[[], Any]:
    """Breaks what the case is about; returns what mends it, so that the weights can be read."""
    wrapper = engine.optimizer
    if case == "expert":
        victim.allreduce = False
    elif case == "tensor parallel":
        victim.tensor_model_parallel = True
    elif case == "float16 autocast":
        victim.comm_dtype = torch.float16
    elif case == "pipeline":
        groups = sys.modules["deepspeed.utils.groups"]
        groups.mpu = SimpleNamespace(get_pipe_parallel_world_size=lambda: 2)
        return lambda: setattr(groups, "mpu", None)
    elif case == "changed weight" and torch.distributed.get_rank() == 0:  # as load_state_dict after initialize
        with torch.no_grad():
            (victim.ds_tensor if hasattr(victim, "ds_tensor") else victim).mul_(2)
    elif case == "unknown table":
        table = wrapper.grad_position
        del wrapper.grad_position
        return lambda: setattr(wrapper, "grad_position", table)
    elif case == "unknown buffer":
        data = victim.data
        victim.data = data.clone()
        return lambda: setattr(victim, "data", data)
    elif case == "missing elements":  # a table that leaves a part of a layer out
        key = wrapper.get_param_id(victim)
        index, start, part = kept = wrapper.grad_position[key]
        wrapper.grad_position[key] = [index, start, part - 1]
        return lambda: wrapper.grad_position.__setitem__(key, kept)
    return lambda: None


CASES = [
    ("max_grad_norm", 2, ("ConflictError", '"gradient_clipping": 1.0')),
    ("max_grad_norm", 0, ("ConflictError", "Trainer(gradient_clip_val=1.0)")),
    ("capturable", 1, ("InvalidOptionError", "capturable")),
    ("expert", 2, ("UnknownShardError", "fc: an expert", "ep_size=1")),
    ("tensor parallel", 3, ("UnknownShardError", "fc: DeepSpeed cut it by tensor parallelism", "FSDP2")),
    ("float16 autocast", 2, ("ConflictError", "bfloat16")),
    ("pipeline", 1, ("UnknownShardError", "pipeline parallelism (2 stages)")),
    ("changed weight", 2, ("UnknownShardError", "fc: on 1 rank", "refresh_fp32_params")),
    ("changed weight", 3, ("UnknownShardError", "fc: on 1 rank")),
    ("unknown table", 3, ("UnknownShardError", "DeepSpeed 0.", "grad_position")),
    ("unknown buffer", 2, ("UnknownShardError", "2 buffers instead of one")),
    ("another order", 1, ("RankDisagreementError", "at this place", "same order on every rank")),
    ("another order", 2, ("RankDisagreementError", "at this place", "same order on every rank")),
    ("missing elements", 3, ("UnknownShardError", "the ranks hold 1018 elements of fc, which has 1020")),
]


def run_refusals() -> list[str]:
    return [refusal(case, stage) for case, stage, _ in CASES]


def test_what_cannot_be_exact_is_refused_on_every_rank_before_the_first_update():
    for messages in on_ranks(run_refusals, 2):
        for (case, stage, expected), message in zip(CASES, messages, strict=True):
            for part in expected:
                assert part in message, f"{case} at stage {stage}: {message}"


def run_without_import() -> str:
    model = Layers()
    config = ds_config(2, optimizer={"type": "LightningLamb", "params": {"lr": LR}})
    assert "lightning_lamb.deepspeed" not in sys.modules
    try:
        made_engine(model, config, model_parameters=[p for _, p in named(model)])
    except AssertionError as error:
        return str(error)
    return "no error"


def test_our_name_means_nothing_to_deepspeed_without_the_import():
    (message,) = on_ranks(run_without_import, 1)
    assert "LightningLamb is not a supported DeepSpeed Optimizer" in message


def test_a_flat_tensor_that_deepspeed_did_not_make_is_an_error_not_a_layer(monkeypatch):
    """Somebody swaps parameters while DeepSpeed is loaded, in a layout that nobody knows."""
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__version__="9.9"))
    weights = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    optimizer = Lamb(weights)
    flat = torch.ones(9)
    flat.grad = torch.ones(9)
    optimizer.param_groups[0]["params"] = [flat]
    from lightning_lamb.errors import UnknownShardError

    with pytest.raises(UnknownShardError, match=r"DeepSpeed 9\.9"):
        optimizer.step()
    assert np.array_equal(flat.detach().numpy(), np.ones(9))
    assert start_weights()
