"""The fused CPU kernel behind `Lamb` and `Lars`: every option, half precision, loss scales, learning-rate tensors."""

from __future__ import annotations

import pytest
import torch
from option_table import LAMB, LARS
from problems import as_parameters, layer_gradients, layer_weights
from tolerances import assert_close
from torch import nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.kernels import cpu

CASES = [(Lamb, name, LAMB) for name in LAMB] + [(Lars, name, LARS) for name in LARS]
CLIPPING = [{}, {"max_grad_norm": 0.5}, {"max_grad_value": 0.7}, {"max_grad_value": 0.7, "max_grad_norm": 0.5}]


def walk(optimizer_class, dtype, steps=6, **options):
    """Steps the awkward layers; returns optimizer and parameters."""
    parameters = as_parameters(layer_weights(), dtype)
    optimizer = optimizer_class(list(parameters.items()), **{"lr": 0.01} | options)
    for grads in layer_gradients(steps, dtype):
        for name, parameter in parameters.items():
            parameter.grad = None if grads[name] is None else grads[name].clone()
        optimizer.step()
    return optimizer, parameters


def kernels_of(optimizer):
    plan = optimizer.plan()
    return {crew.kernel for roster in plan.rosters.values() for crew in roster.whole}


@pytest.mark.parametrize(("optimizer_class", "name", "table"), CASES, ids=[f"{c.__name__} {n}" for c, n, _ in CASES])
def test_fused_walks_with_eager_through_every_option(optimizer_class, name, table):
    fused, got = walk(optimizer_class, torch.float64, fused=True, **table[name])
    _, expected = walk(optimizer_class, torch.float64, foreach=False, **table[name])
    assert kernels_of(fused) == {cpu}
    for layer in expected:
        assert_close(got[layer], expected[layer], "float64", layer)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"nesterov": "both"}, {"norm": "linf"}], ids=str)
def test_half_precision_masters_walk_with_eager(half, options):
    fused, got = walk(Lamb, half, fused=True, **options)
    eager, expected = walk(Lamb, half, foreach=False, **options)
    assert kernels_of(fused) == {cpu}
    for layer in expected:
        master = fused.state[got[layer]]["master_weight"]
        assert_close(master, eager.state[expected[layer]]["master_weight"], "float32 ratio", layer)
        assert torch.equal(master.to(half), got[layer].detach())


@pytest.mark.parametrize("options", [{"lr": torch.tensor(0.01)}, {"capturable": True}], ids=["tensor lr", "capturable"])
def test_tensors_on_the_device_as_learning_rate_and_step(options):
    _, got = walk(Lamb, torch.float64, fused=True, **options)
    _, expected = walk(Lamb, torch.float64, foreach=False)
    for layer in expected:
        assert_close(got[layer], expected[layer], "float32" if "lr" in options else "float64", layer)


def loss_of(weight, step):
    return ((weight - 1.0) ** 2 * (1.0 + step)).sum()


@pytest.mark.parametrize("options", CLIPPING, ids=str)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_is_taken_out_on_the_way(options, unscale):
    plain, scaled = (nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 4.0]])) for _ in range(2))
    control, optimizer = (Lamb([weight], lr=0.1, fused=True, **options) for weight in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(6):
        control.zero_grad()
        loss_of(plain, step).backward()
        control.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        before = scaled.grad.clone()
        scaler.step(optimizer)
        assert torch.equal(scaled.grad, before), "a gradient was rewritten"
        scaler.update()
    assert torch.equal(plain, scaled)
    if "max_grad_norm" in options:
        assert torch.equal(optimizer.grad_norm, control.grad_norm)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_overflow_is_no_step_at_all(value):
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = Lamb([weight], fused=True, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflow in (False, True, False):
        weight.grad = torch.full((3, 3), 1024.0)
        if overflow:
            weight.grad[1, 1] = value
        scaler.scale(torch.ones(()))  # the scaler begins lazily
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) == overflow
    assert optimizer.state[weight]["step"] == 2
    assert scaler.get_scale() == 512.0


def test_only_fused_by_name_takes_scaled_gradients():
    """Lightning clips gradients itself, and cannot where an optimizer unscales: as with torch's AdamW, it is opt-in."""
    weight = nn.Parameter(torch.ones(2))
    assert not Lamb([weight])._step_supports_amp_scaling
    assert Lamb([weight], fused=True)._step_supports_amp_scaling
