"""Layers of every awkward kind, gradients for them, and the loop that walks an optimizer beside a reference.

Gradients are drawn from a generator and do not depend on the weights, so two correct implementations cannot drift apart
and a wrong one cannot hide behind chaos.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tolerances import assert_close
from torch import nn

STEPS = 50
LAYER_SHAPES = {
    "matrix": (5, 3),
    "wide": (2, 40),
    "bias": (5,),
    "scalar": (),  # no dimension at all, like a learned temperature
    "empty": (0, 4),  # a layer without elements: its norm is 0 and nothing may divide by it
    "zero_init": (4, 4),  # ||w|| = 0 at the first step
    "conv": (3, 2, 3, 3),  # channels_last
    "strided": (4, 6),  # a transposed view, so not contiguous
    "silent": (3, 3),  # its gradient is all zero at every step
    "sometimes": (3, 4),  # no gradient at all at every third step, the first included
    "large": (4, 5),  # ||w|| far above 10, where clamping implementations differ
}


def layer_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Name -> float64 array, one per kind of layer."""
    draw = np.random.default_rng(seed)
    weights = {name: draw.standard_normal(shape) for name, shape in LAYER_SHAPES.items()}
    weights["zero_init"] = np.zeros(LAYER_SHAPES["zero_init"])
    weights["large"] *= 100.0
    weights["scalar"] = np.array(3.0)  # far enough from 0 not to pass it in 50 steps, where float32 has nothing to hold
    return {name: np.asarray(weight) for name, weight in weights.items()}


def layer_gradients(steps: int, dtype: torch.dtype, seed: int = 1) -> Iterator[dict[str, torch.Tensor | None]]:
    """One dict per step: name -> gradient in ``dtype``, or None. Scales differ by layer and over time."""
    draw = np.random.default_rng(seed)
    for step in range(steps):
        grads: dict[str, torch.Tensor | None] = {}
        for index, (name, shape) in enumerate(LAYER_SHAPES.items()):
            values = draw.standard_normal(shape) * 2.0 ** (index - 5) * (1.0 + step % 7)
            grads[name] = torch.as_tensor(np.asarray(values)).to(dtype)
        grads["silent"] = torch.zeros(LAYER_SHAPES["silent"], dtype=dtype)
        if step % 3 == 0:
            grads["sometimes"] = None
        yield grads


def as_parameters(weights: dict[str, np.ndarray], dtype: torch.dtype, device: str = "cpu") -> dict[str, nn.Parameter]:
    """The same layers as torch parameters, "conv" in channels_last and "strided" as a transposed view."""
    parameters = {}
    for name, weight in weights.items():
        value = torch.as_tensor(weight.copy()).to(dtype=dtype, device=device)
        if name == "conv":
            value = value.contiguous(memory_format=torch.channels_last)
        if name == "strided":
            value = value.t().contiguous().t()
            assert not value.is_contiguous()
        parameters[name] = nn.Parameter(value)
    return parameters


def set_gradients(parameters: dict[str, nn.Parameter], grads: dict[str, torch.Tensor | None]) -> None:
    """Gives each parameter a fresh gradient tensor, with the strides that autograd would give it."""
    for name, parameter in parameters.items():
        grad = grads[name]
        parameter.grad = None if grad is None else torch.empty_like(parameter).copy_(grad)


def learning_rate(step: int) -> float:
    """A learning rate that changes at every step: warm-up from 0, peak 0.01."""
    return 0.01 * min(step / 10, 1.0)


def walk_together(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    reference: Any,
    tolerance: str,
    steps: int = STEPS,
    seed: int = 1,
) -> None:
    """Steps optimizer and reference over the same gradients; compares the ratios at every step, the rest at the end.

    The optimizer must have been given named parameters. Every group runs at `learning_rate` times its own one, which
    it has again afterwards.
    """
    base = [float(group["lr"]) for group in optimizer.param_groups]
    reference_base = {name: options["lr"] for name, options in reference.options.items()}
    dtype = next(iter(parameters.values())).dtype
    ratios = "float32 ratio" if tolerance == "float32" else tolerance
    for step, grads in enumerate(layer_gradients(steps, dtype, seed)):
        set_gradients(parameters, grads)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * learning_rate(step)
        for name, lr in reference_base.items():
            reference.options[name]["lr"] = lr * learning_rate(step)
        optimizer.step()
        reference.step({k: None if g is None else g.double().numpy() for k, g in grads.items()})
        if step % 10 in (0, 1):
            assert_close(optimizer.trust_ratios, reference.trust_ratios, ratios, f"ratio at step {step}")
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr
    for name, lr in reference_base.items():
        reference.options[name]["lr"] = lr
    assert_close(parameters, reference.weights, tolerance, "weight")
    assert_close(optimizer.trust_ratios, reference.trust_ratios, ratios, "ratio")
    assert_close(optimizer.weight_norms, reference.weight_norms, tolerance, "weight norm")
    assert_close(optimizer.update_norms, reference.update_norms, ratios, "update norm")
    for name, state in reference.state.items():
        for key, value in state.items():
            assert_close(optimizer.state[parameters[name]][key], value, tolerance, f"{key} of {name}")


def named(parameters: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    """What ``module.named_parameters()`` would give."""
    return list(parameters.items())


def snapshot(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A deep copy of everything a refused call must leave alone: weights, state, group options."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    state = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    return {"groups": groups, "weights": weights, "state": state, "entries": len(optimizer.state)}


def assert_identical(got: Any, expected: Any, where: str = "") -> None:
    """Bitwise equality of nested containers of tensors and plain values, dtypes included; NaN equals NaN."""
    assert type(got) is type(expected), f"{where}: {type(got)} instead of {type(expected)}"
    if isinstance(expected, dict):
        assert list(got) == list(expected), f"{where}: keys {list(got)} instead of {list(expected)}"
        for key in expected:
            assert_identical(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), where
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_identical(one, other, f"{where}[{index}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
    else:
        assert got == expected, f"{where}: {got!r} instead of {expected!r}"
