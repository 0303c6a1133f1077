"""bf16 and fp16 parameters: fp32 masters and moments in the state, so small updates arrive and resume is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import (
    as_parameters,
    assert_identical,
    layer_gradients,
    layer_weights,
    learning_rate,
    named,
    set_gradients,
    snapshot,
)
from reference import ReferenceLamb, ReferenceLars
from tolerances import assert_close, to_numpy
from torch import nn

from lightning_lamb import Lamb, Lars

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def walk(optimizer, parameters, gradients):
    for grads in gradients:
        set_gradients(parameters, grads)
        optimizer.step()


@FORMS
@OPTIMIZERS
@HALVES
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "exempt_1d": False}], ids=["defaults", "clipped"])
def test_master_equals_reference_to_float32_and_weight_is_its_rounding(optimizer_class, dtype, options, foreach):
    parameters = as_parameters(layer_weights(), dtype)
    start = {name: to_numpy(p) for name, p in parameters.items()}
    reference_class = ReferenceLamb if optimizer_class is Lamb else ReferenceLars
    reference = reference_class(start, lr=1.0, **options)
    optimizer = optimizer_class(named(parameters), lr=1.0, foreach=foreach, **options)
    for step, grads in enumerate(layer_gradients(50, dtype)):
        set_gradients(parameters, grads)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        reference.step({k: None if g is None else to_numpy(g) for k, g in grads.items()}, lr=learning_rate(step))
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        assert_close(state["master_weight"], reference.weights[name], "float32", name)
        assert_close(parameter, reference.weights[name], "bf16 weight" if dtype == torch.bfloat16 else "fp16 weight")
        assert_identical(state["master_weight"].to(dtype), parameter.detach())
        moments = [value for key, value in state.items() if key != "step"]
        assert {value.dtype for value in moments} == {torch.float32}


@FORMS
@HALVES
def test_small_updates_move_at_least_80_percent_of_elements_in_60_steps(dtype, foreach):
    """Without masters 77 % of bf16 elements never moved at this learning rate: each update is under half an ulp."""
    torch.manual_seed(3)
    weight = nn.Parameter(torch.randn(64, 64).to(dtype))
    before = weight.detach().clone()
    optimizer = Lamb([weight], lr=1e-3, foreach=foreach)
    direction = torch.randn(64, 64)
    for _ in range(60):
        weight.grad = (direction + 0.3 * torch.randn(64, 64)).to(dtype)
        optimizer.step()
    assert (weight != before).float().mean() > 0.8


@FORMS
@OPTIMIZERS
@HALVES
def test_master_and_moments_survive_load_state_dict_unrounded(optimizer_class, dtype, foreach):
    parameters = as_parameters(layer_weights(), dtype)
    optimizer = optimizer_class(named(parameters), lr=1e-3, foreach=foreach)
    walk(optimizer, parameters, layer_gradients(5, dtype))
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    loaded = optimizer_class(named(copies), foreach=foreach)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_identical(snapshot(loaded)["state"], snapshot(optimizer)["state"])
    master = loaded.state[copies["matrix"]]["master_weight"]
    assert not master.to(dtype).float().equal(master)  # there were digits to lose


@OPTIMIZERS
@HALVES
@pytest.mark.parametrize("weights_first", [True, False])
def test_resume_is_bitwise_whichever_of_model_and_optimizer_is_loaded_first(optimizer_class, dtype, weights_first):
    gradients = list(layer_gradients(10, dtype))
    parameters = as_parameters(layer_weights(), dtype)
    optimizer = optimizer_class(named(parameters), lr=1e-3)
    walk(optimizer, parameters, gradients[:5])
    weights, state = {k: p.detach().clone() for k, p in parameters.items()}, copy.deepcopy(optimizer.state_dict())

    other = as_parameters(layer_weights(seed=9), dtype)
    resumed = optimizer_class(named(other), lr=1e-3)
    walk(resumed, other, gradients[:2])  # it has a life, and masters, of its own

    def load_weights():
        with torch.no_grad():
            for name, value in weights.items():
                other[name].copy_(value)

    for load in (load_weights, lambda: resumed.load_state_dict(state))[:: 1 if weights_first else -1]:
        load()
    walk(optimizer, parameters, gradients[5:])
    walk(resumed, other, gradients[5:])
    assert_identical(snapshot(resumed), snapshot(optimizer))


@FORMS
@OPTIMIZERS
@HALVES
@pytest.mark.parametrize("how", ["copy_ under no_grad", "data.copy_", "data", "load_state_dict"])
def test_weights_changed_outside_win_over_the_stale_master(optimizer_class, dtype, how, foreach):
    model = nn.Linear(6, 6).to(dtype)
    optimizer = optimizer_class(model.named_parameters(), lr=1e-3, foreach=foreach)

    def step():
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
        optimizer.step()

    step()
    new = torch.randn(6, 6).to(dtype)
    if how == "copy_ under no_grad":
        with torch.no_grad():
            model.weight.copy_(new)
    elif how == "data.copy_":  # leaves the version counter as it was
        model.weight.data.copy_(new)
    elif how == "data":
        model.weight.data = new.clone()
    else:
        model.load_state_dict({"weight": new, "bias": model.bias.detach().clone()})
    optimizer.param_groups[0]["lr"] = 0.0
    step()
    assert_identical(model.weight.detach(), new)
    # Elements that by chance round to what they were may keep their digits; the others are the new weights exactly.
    master = optimizer.state[model.weight]["master_weight"]
    assert_identical(master.to(dtype), new)
    assert master.eq(new.float()).float().mean() > 0.9
    optimizer.param_groups[0]["lr"] = 0.1
    step()
    assert (model.weight.float() - new.float()).norm() < 0.2 * new.float().norm()


@FORMS
@HALVES
def test_gradients_may_be_float32_on_half_precision_weights_and_norms_are_float32(dtype, foreach):
    weight = nn.Parameter(torch.full((64, 64), 0.1).to(dtype))
    optimizer = Lamb([("w", weight)], lr=0.01, max_grad_norm=1.0, foreach=foreach)
    weight.grad = torch.full((64, 64), 600.0).to(dtype)  # its square overflows fp16
    optimizer.step()
    assert weight.isfinite().all()
    assert_close(optimizer.grad_norm, to_numpy(weight.grad)[0, 0] * 64, "float32")
    assert_close(optimizer.weight_norms["w"], to_numpy(torch.tensor(0.1).to(dtype)) * 64, "float32")


def test_float32_and_float64_parameters_have_no_master():
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        weight.grad = torch.ones(2, 2, dtype=dtype)
        optimizer = Lamb([weight])
        optimizer.step()
        assert "master_weight" not in optimizer.state[weight]


@HALVES
def test_casting_the_model_after_building_the_optimizer_keeps_training(dtype):
    """``model.to(dtype)`` swaps the data under the same parameter objects."""
    model = nn.Linear(4, 4)
    optimizer = Lamb(model.named_parameters(), lr=0.01)
    for moment in ("float32", "half", "float32"):
        model = model.to(dtype if moment == "half" else torch.float32)
        before = model.weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert model.weight.isfinite().all()
        assert not model.weight.equal(before)
