"""Infinities, NaN, denormals, huge and tiny numbers come out of every kernel as they do of the readable one."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from lightning_lamb.kernels import eager
from tests.kernels.batches import Case, batch_of, bounds, copy_of, scales, tensors_of

FUSED = pytest.mark.parametrize("kernel", ["cpu", "triton"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
OPTIONS = [
    {},
    {"norm": "linf", "max_grad_value": 2.0},
    pytest.param({"norm": "l1", "nesterov": "both", "max_grad_value": 2.0}, marks=pytest.mark.slow),
    pytest.param({"weight_decay": 0.0}, marks=pytest.mark.slow),
]
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0]


def both(kernel, case, batch):
    expected = copy_of(batch)
    norms = kernel.step(batch, scales(case, batch), *bounds(case))
    wanted = eager.step(expected, scales(case, expected), *bounds(case))
    return batch, expected, norms, wanted


@FUSED
@DTYPES
@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_special_values_spread_exactly_as_far_as_in_the_readable_kernel(kernel, dtype, value, options):
    for where in ("weights", "grads", "moments1", "moments2"):
        case = Case(options, dtype=dtype)
        batch = batch_of(case, [torch.randn(70, dtype=dtype), torch.randn(17000, dtype=dtype)], step=3)
        for tensor in getattr(batch, where):
            tensor[5] = value
        batch, expected, norms, wanted = both(kernel, case, batch)
        for one, other in zip([*tensors_of(batch), *norms], [*tensors_of(expected), *wanted], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, equal_nan=True)


@FUSED
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-25, 1e-15, 1e15, 1e25], ids=str)
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_norms_of_denormal_tiny_and_huge_weights_are_right_in_float32(kernel, scale, norm):
    """A float32 sum of squares of 1e-25 is zero, and of 1e25 infinite: the ratio would be 1, or nothing."""
    case = Case({"norm": norm}, dtype=torch.float32, lr=1e-3)
    weights = [torch.randn(size) * scale for size in (100, 30000)]
    batch, expected, norms, wanted = both(kernel, case, batch_of(case, weights, step=3))
    for one, other in zip(norms, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for one, other in zip(batch.weights, expected.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@FUSED
def test_denormal_moments_and_gradients_are_not_flushed_to_zero(kernel):
    case = Case({"eps": 1e-30}, dtype=torch.float64)
    batch = batch_of(case, [torch.randn(50, dtype=torch.float64)])
    batch.grads[0].fill_(1e-310)
    batch, expected, *_ = both(kernel, case, batch)
    assert batch.moments1[0].count_nonzero() == 50
    assert_close(batch.moments1[0], expected.moments1[0], "float64")


@FUSED
@DTYPES
def test_ratio_is_one_where_weight_or_update_is_zero_whatever_the_bounds(kernel, dtype):
    case = Case({"weight_decay": 0.0, "trust_ratio_bounds": (3.0, 4.0), "weight_norm_bounds": (5.0, 6.0)}, dtype=dtype)
    batch = batch_of(case, [torch.zeros(30, dtype=dtype), torch.randn(30, dtype=dtype), torch.randn(0, dtype=dtype)])
    batch.grads[1].zero_()
    norms = kernel.step(batch, scales(case, batch), *bounds(case))
    assert norms.ratios.tolist() == [1.0, 1.0, 1.0]
    assert batch.weights[0].count_nonzero() == 30
