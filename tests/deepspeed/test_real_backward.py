"""Real training under ZeRO: no further from float64 than twice what one process in the same precision is.

Gradients come from a backward pass, so that summation over ranks and rounding of activations matter too; how far they
may carry is measured on the same training without DeepSpeed instead of being chosen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from torch import nn
from zero_setting import ds_config, full_precision, largest_error, made_engine, on_ranks, rank, world_size

from lightning_lamb import Lamb
from tests.sharding.networks import Net, batches, learning_rate, loss_of, new_net

WIDTH, RATE = 17, 0.05
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    {"stage": stage, "dtype": dtype, "clip": clip, "micro_batches": 1}
    for stage in (0, 1, 2, 3)
    for dtype in PRECISIONS
    for clip in (0.0, 0.5)
]
CASES += [{"stage": stage, "dtype": "fp32", "clip": 0.5, "micro_batches": 2} for stage in (1, 2, 3)]


def trained(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Layer name to weight after 20 steps on this rank's part of the batches."""
    model = new_net(WIDTH)
    optimizer = Lamb(model.named_parameters(), lr=RATE)
    accumulation = case["micro_batches"]
    config = ds_config(case["stage"], case["dtype"], case["clip"], gradient_accumulation_steps=accumulation)
    engine = made_engine(model, config, optimizer=optimizer)
    for step, (inputs, targets) in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        for part in range(accumulation):
            mine = slice(rank() * accumulation + part, None, world_size() * accumulation)
            engine.backward(loss_of(engine, inputs[mine].to(PRECISIONS[case["dtype"]]), targets[mine]))
            engine.step()
    weights = full_precision(engine)
    engine.destroy()
    return weights


def run_cases(cases: list[dict[str, Any]]) -> list[dict[str, np.ndarray]]:
    return [trained(case) for case in cases]


def unsharded(dtype: torch.dtype, clip: float) -> dict[str, np.ndarray]:
    """The same training with torch alone; half precision with float32 masters, whose gradients are what is clipped."""
    model: Net = new_net(WIDTH).to(dtype)
    full = dtype == torch.float64
    masters = {n: nn.Parameter(p.detach().to(torch.float64 if full else torch.float32)) for n, p in trainable(model)}
    optimizer = Lamb(masters.items(), lr=RATE)
    for step, (inputs, targets) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        model.zero_grad()
        loss_of(model, inputs.to(dtype), targets).backward()
        for name, parameter in trainable(model):
            masters[name].grad = parameter.grad.to(masters[name].dtype)
        if clip:
            nn.utils.clip_grad_norm_(masters.values(), clip)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in trainable(model):
                parameter.copy_(masters[name])
    return {name: master.detach().double().numpy() for name, master in masters.items()}


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def test_two_ranks_stay_within_twice_the_error_of_one_process_in_the_same_precision():
    exact = {clip: unsharded(torch.float64, clip) for clip in (0.0, 0.5)}
    alone = {
        (name, clip): largest_error(unsharded(dtype, clip), exact[clip])
        for name, dtype in PRECISIONS.items()
        for clip in exact
    }
    assert all(error > 0 for error in alone.values()), "nothing is rounded: the comparison would be empty"
    everyone = on_ranks(run_cases, 2, CASES)
    found = {}
    for case, weights, others in zip(CASES, *everyone, strict=True):
        assert largest_error(others, weights) == 0.0, f"ranks differ: {case}"
        error = largest_error(weights, exact[case["clip"]])
        found[str(case)] = f"{error:.2e} / {alone[case['dtype'], case['clip']]:.2e}"
        assert error <= 2 * alone[case["dtype"], case["clip"]], (case, found)
    print(found)
