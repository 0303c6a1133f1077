"""torch.compile, capturable, differentiable, and the guard against reading the device inside a step."""

from __future__ import annotations

import pytest
import torch
from problems import (
    as_parameters,
    assert_identical,
    layer_gradients,
    layer_weights,
    named,
    set_gradients,
    walk_together,
)
from reference import ReferenceLamb, ReferenceLars
from tolerances import assert_close
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_lamb import Lamb, Lars

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5}, {"bias_correction": "lr", "trust_ratio_bounds": (0.01, 10.0)}, {"nesterov": "both"}],
    ids=["defaults", "clipped", "correction on lr", "NN-LAMB"],
)


# ---------------------------------------------------------------------------------------------------- host reads


@FORMS
@OPTIMIZERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 1.0, "max_grad_value": 0.5}], ids=["unclipped", "clipped"])
def test_step_never_reads_the_device_so_it_runs_on_meta_tensors(optimizer_class, dtype, clip, foreach):
    """A meta tensor has no values: .item(), float(), ``if tensor`` raise. On XLA each would be one compilation."""
    parameters = as_parameters(layer_weights(), dtype, device="meta")
    optimizer = optimizer_class(named(parameters), foreach=foreach, trust_ratio_bounds=(0.01, 10.0), **clip)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    expected = {name for name, parameter in parameters.items() if parameter.ndim > 1}
    assert set(optimizer.trust_ratios) == expected
    assert {ratio.shape for ratio in optimizer.trust_ratios.values()} == {()}
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}


def test_the_guard_itself_catches_a_host_read():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(2, device="meta").sum().item()


# ---------------------------------------------------------------------------------------------------- capturable


@FORMS
@VARIANTS
def test_capturable_on_cpu_equals_reference(options, foreach):
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer = Lamb(named(parameters), lr=1.0, capturable=True, foreach=foreach, **options)
    walk_together(optimizer, parameters, ReferenceLamb(weights, lr=1.0, **options), "float64")


@FORMS
def test_lars_capturable_on_cpu_equals_reference(foreach):
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer = Lars(named(parameters), lr=1.0, capturable=True, foreach=foreach)
    walk_together(optimizer, parameters, ReferenceLars(weights, lr=1.0), "float64")


@FORMS
@VARIANTS
def test_capturable_keeps_step_on_the_parameters_device_and_reads_nothing(options, foreach):
    parameters = as_parameters(layer_weights(), torch.float32, device="meta")
    optimizer = Lamb(named(parameters), lr=torch.tensor(0.1), capturable=True, foreach=foreach, **options)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
    assert {state["step"].device.type for state in optimizer.state.values()} == {"meta"}


# ------------------------------------------------------------------------------------------------- differentiable


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.3, "norm": "l1"},
        {"max_grad_norm": 0.5, "bias_correction": "lr"},
        {"nesterov": "both", "trust_ratio_bounds": (0.01, 10.0)},
        {"weight_norm_bounds": (0.1, 1.0)},
        {"adapt": False, "bias_correction": False, "maximize": True},
    ],
)
def test_one_lamb_step_is_differentiable_in_weight_gradient_moments_and_learning_rate(options):
    def after_step(weight, grad, moment1, moment2, lr):
        weight = weight.clone()
        weight.grad = grad
        optimizer = Lamb([weight], lr=lr, differentiable=True, **options)
        moments = {"exp_avg": moment1.clone(), "exp_avg_sq": moment2.clone()}
        optimizer.state[weight].update(step=torch.tensor(3.0), **moments)
        optimizer.step()
        return weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]

    draw = [torch.rand(2, 3, dtype=torch.float64) + 0.5 for _ in range(4)]
    inputs = [value.requires_grad_() for value in (*draw, torch.tensor(0.1, dtype=torch.float64))]
    assert torch.autograd.gradcheck(after_step, inputs)


def test_one_lars_step_is_differentiable():
    def after_step(weight, grad, moment, lr):
        weight = weight.clone()
        weight.grad = grad
        optimizer = Lars([weight], lr=lr, differentiable=True)
        optimizer.state[weight].update(step=torch.tensor(3.0), exp_avg=moment.clone())
        optimizer.step()
        return weight, optimizer.state[weight]["exp_avg"]

    draw = [torch.rand(2, 3, dtype=torch.float64) + 0.5 for _ in range(3)]
    inputs = [value.requires_grad_() for value in (*draw, torch.tensor(0.1, dtype=torch.float64))]
    assert torch.autograd.gradcheck(after_step, inputs)


def test_differentiable_step_equals_reference():
    weights = layer_weights()
    leaves = as_parameters(weights, torch.float64)
    parameters = {name: leaf.detach().clone() for name, leaf in leaves.items()}  # no graph grows over the steps
    optimizer = Lamb(named(parameters), lr=1.0, differentiable=True)
    walk_together(optimizer, parameters, ReferenceLamb(weights, lr=1.0), "float64", steps=10)


# ------------------------------------------------------------------------------------------------------- compile


@pytest.mark.slow
@FORMS
@OPTIMIZERS
@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
def test_compiled_step_does_not_recompile_after_the_second_step(optimizer_class, clip, foreach):
    torch._dynamo.reset()
    weights = {name: value for name, value in layer_weights().items() if name in ("matrix", "bias", "scalar", "conv")}
    parameters = as_parameters(weights, torch.float32)
    control_parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    optimizer = optimizer_class(named(parameters), lr=torch.tensor(0.01), foreach=foreach, max_grad_norm=clip)
    control = optimizer_class(named(control_parameters), lr=0.01, foreach=foreach, max_grad_norm=clip)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)
    counts = []
    for index, grads in enumerate(layer_gradients(6, torch.float32)):
        set_gradients(parameters, grads)
        set_gradients(control_parameters, grads)
        optimizer.param_groups[0]["lr"].fill_(0.01 / (1 + index))
        control.param_groups[0]["lr"] = 0.01 / (1 + index)
        # A function that is recompiled too often is quietly left uncompiled, which would look like success.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            step()
        control.step()
        counts.append(counter.frame_count)
    assert counts[0] > 0, "nothing was compiled"
    assert counts[-1] == counts[1], f"graphs compiled so far, step by step: {counts}"
    assert_close(parameters, control_parameters, "compiled")
    torch._dynamo.reset()


@pytest.mark.slow
def test_step_compiled_by_inductor_equals_eager():
    torch._dynamo.reset()
    weights = {name: value for name, value in layer_weights().items() if name in ("matrix", "bias", "conv")}
    parameters, control_parameters = (as_parameters(weights, torch.float32) for _ in range(2))
    optimizer, control = (Lamb(named(p), lr=0.01) for p in (parameters, control_parameters))
    step = torch.compile(optimizer.step)
    for grads in layer_gradients(4, torch.float32):
        set_gradients(parameters, grads)
        set_gradients(control_parameters, grads)
        step()
        control.step()
    assert_close(parameters, control_parameters, "compiled")
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_model_trains_as_the_plain_one_does():
    torch._dynamo.reset()
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Lamb(model.named_parameters(), lr=0.01) for model in models]
    forwards = [models[0], torch.compile(models[1], backend="aot_eager")]
    batch = torch.randn(16, 4)
    for _ in range(5):
        for forward, optimizer in zip(forwards, optimizers, strict=True):
            optimizer.zero_grad()
            forward(batch).square().mean().backward()
            optimizer.step()
    assert_close(dict(models[1].named_parameters()), dict(models[0].named_parameters()), "compiled")
    torch._dynamo.reset()


def test_trust_ratios_are_the_same_tensors_when_read_twice_and_hold_no_graph():
    parameters = as_parameters(layer_weights(), torch.float32)
    optimizer = Lamb(named(parameters))
    set_gradients(parameters, next(layer_gradients(1, torch.float32)))
    optimizer.step()
    assert_identical(optimizer.trust_ratios, optimizer.trust_ratios)
    assert not any(ratio.requires_grad for ratio in optimizer.trust_ratios.values())
