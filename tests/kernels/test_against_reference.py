"""Every kernel and every option, without an optimizer around, against the NumPy float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from option_table import LAMB, LARS
from tolerances import assert_close

from lightning_lamb.kernels import eager
from lightning_lamb.kernels.batch import Batch
from tests.kernels.batches import (
    ODD_SIZES,
    TRITON_SIZES,
    Case,
    assert_as_eager,
    batch_of,
    bounds,
    copy_of,
    scales,
    tensors_of,
    walk,
)

FUSED = pytest.mark.parametrize("kernel", ["cpu", "triton"], indirect=True)
CPU = pytest.mark.parametrize("kernel", ["cpu"], indirect=True)
SHAPES = {"matrix": (5, 3), "vector": (7,), "scalar": (), "empty": (0, 4), "tile and a bit": (16387,), "block": (8, 64)}
# Exemptions and "decayed" are the optimizer's business, not a kernel's.
OPTIONS = {name: case for name, case in LAMB.items() if "exempt_1d" not in case and case.get("adapt") != "decayed"}
LARS_OPTIONS = {name: case for name, case in LARS.items() if "exempt_1d" not in case and case.get("adapt") != "decayed"}
# Triton's interpreter takes a second per case: by default those that together go through every branch of the kernel.
INTERPRETED = ("phi and ratio bounded, l1", "never adapted", "no correction", "NN-LAMB, l1, bounded, clipped, maximize")
INTERPRETED += ("N-LAMB, linf", "clipped by value, then norm", "no decay", "linf norm", "heavy momentum", "defaults")


def cases(kernels, names):
    """(kernel, option) pairs; those that need an interpreter are slow, up to the essential ones."""
    return pytest.mark.parametrize(
        ("kernel", "name"),
        [
            pytest.param(kernel, name, marks=[pytest.mark.slow] * (kernel == "triton" and name not in INTERPRETED))
            for kernel in kernels
            for name in names
        ],
        indirect=["kernel"],
    )


def steps_of(kernel):
    """How many; after two the moments of the first are in use."""
    return 2 if kernel.__name__.endswith("triton") else 6


@cases(["eager", "foreach", "cpu", "triton"], OPTIONS)
def test_lamb_equals_the_reference_to_1e_12_in_float64(kernel, name):
    walk(kernel, Case(OPTIONS[name]), SHAPES, "float64", steps_of(kernel))


@cases(["eager", "foreach", "cpu", "triton"], LARS_OPTIONS)
def test_lars_equals_the_reference_to_1e_12_in_float64(kernel, name):
    walk(kernel, Case(LARS_OPTIONS[name], base="momentum"), SHAPES, "float64", steps_of(kernel))


@cases(["cpu", "triton"], OPTIONS)
def test_lamb_equals_the_reference_in_float32(kernel, name):
    walk(kernel, Case(OPTIONS[name], dtype=torch.float32), SHAPES, "float32", steps_of(kernel))


@FUSED
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, "float32"), (torch.float64, "float64")])
def test_gradients_of_every_dtype_are_read_as_they_are(kernel, grad_dtype, dtype, tolerance):
    for nesterov in (None, "both"):  # the second one reads gradients in both passes
        case = Case({"nesterov": nesterov}, dtype=dtype, grad_dtype=grad_dtype)
        walk(kernel, case, {"matrix": (5, 3), "tile and a bit": (16387,)}, tolerance, steps=2)


@FUSED
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
@pytest.mark.parametrize("nesterov", [None, "first", "both"])
def test_two_calls_end_where_the_readable_kernel_does(kernel, norm, nesterov):
    case = Case({"norm": norm, "nesterov": nesterov, "weight_norm_bounds": (0.1, 50.0)})
    weights = [torch.randn(size, dtype=torch.float64) for size in (3, 40000, 100)]
    assert_as_eager(kernel, case, batch_of(case, weights, step=5), "float64", calls=2)


@FUSED
@pytest.mark.parametrize("norm", ["l2", pytest.param("l1", marks=pytest.mark.slow), "linf"])
def test_odd_sizes(kernel, norm):
    case = Case({"norm": norm})
    sizes = ODD_SIZES if kernel.__name__.endswith("cpu") else TRITON_SIZES
    for calls in (1, 2):
        weights = [torch.randn(size, dtype=torch.float64) for size in sizes]
        assert_as_eager(kernel, case, batch_of(case, weights, step=3), "float64", calls)


@CPU
@pytest.mark.parametrize("calls", [1, 2])
def test_odd_sizes_one_by_one(kernel, calls):
    case = Case()
    for size in ODD_SIZES:
        weight = torch.randn(size, dtype=torch.float64)
        assert_as_eager(kernel, case, batch_of(case, [weight], step=3, seed=size), "float64", calls)


@CPU
def test_odd_sizes_together_and_in_float32(kernel):
    case = Case(dtype=torch.float32)
    weights = [torch.randn(size) for size in ODD_SIZES]
    assert_as_eager(kernel, case, batch_of(case, weights, step=3), "float32")


@CPU
@pytest.mark.slow
def test_thirty_million_elements(kernel):
    case = Case(dtype=torch.float32)
    batch = batch_of(case, [torch.randn(30_000_001)], step=3)
    wide = copy_of(batch)
    lists = {name: [t.double() for t in getattr(wide, name)] for name in ("weights", "grads", "moments1", "moments2")}
    expected = Batch(wide.options, coefficients=wide.coefficients, **lists)
    norms, wanted = (k.step(b, [0.01], None, None) for k, b in ((kernel, batch), (eager, expected)))
    assert_close(batch.weights[0], expected.weights[0], "float32")
    for one, other in zip(norms, wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-7)


@FUSED
@pytest.mark.parametrize(("half", "tolerance"), [(torch.bfloat16, "bf16 weight"), (torch.float16, "fp16 weight")])
def test_half_precision_parameters_are_rounded_masters_and_pass_on_what_others_wrote(kernel, half, tolerance):
    case = Case(dtype=torch.float32, grad_dtype=half)
    batch = batch_of(case, [torch.randn(size) for size in (40, 20000, 0)], step=2)
    batch.parameters = [weight.to(half) for weight in batch.weights]
    batch.parameters[0][3] = 7.0  # loaded into the module by somebody else
    expected = copy_of(batch)
    kernel.step(batch, scales(case, batch), *bounds(case))
    eager.step(expected, scales(case, expected), *bounds(case))
    assert abs(batch.weights[0][3].item() - 7.0) < 0.2
    for one, other in zip(tensors_of(batch), tensors_of(expected), strict=True):
        tolerance = (
            "float32"
            if one.dtype == torch.float32
            else {2**-8: "bf16 weight"}.get(torch.finfo(half).eps / 1, "bf16 weight")
        )
        assert_close(one, other, tolerance)
    for weight, parameter in zip(batch.weights, batch.parameters, strict=True):
        assert torch.equal(weight.to(half), parameter)
