"""Layers above the size at which the multi-tensor kernel cuts them into tiles, or batches are cut in two."""

from __future__ import annotations

import pytest
import torch
from option_table import LAMB, LARS
from problems import as_parameters, layer_weights, named, walk_together
from reference import ReferenceLamb, ReferenceLars, layer_norm
from tolerances import assert_close, to_numpy
from torch import nn

from lightning_lamb import Lamb, Lars, equations
from lightning_lamb.kernels import foreach, statistics
from lightning_lamb.optimizers import batches

FORMS = pytest.mark.parametrize("use_foreach", [False, True], ids=["eager", "foreach"])
SIZE = 600  # 600 x 600 elements are more than one tile


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Every layer of more than 4 elements is cut, the last tile being shorter; batches hold one or two layers."""
    monkeypatch.setattr(foreach, "TILE", 4)
    monkeypatch.setattr(foreach, "FEW", 3)
    monkeypatch.setattr(foreach, "ROW", 3)
    monkeypatch.setattr(statistics, "TILE", 3)
    monkeypatch.setattr(batches, "WHOLE_BATCH_BYTES", {"cpu": 200})


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize(("dtype", "lr"), [("float64", 1.0), ("float32", 0.01)])
@pytest.mark.parametrize("case", LAMB)
def test_lamb_in_tiles_equals_reference(case, dtype, lr):
    """To 1e-12 in float64; float32, whose default options have a way of their own, to its own tolerance."""
    weights = layer_weights()
    parameters = as_parameters(weights, getattr(torch, dtype))
    optimizer = Lamb(named(parameters), lr=lr, foreach=True, **LAMB[case])
    walk_together(optimizer, parameters, ReferenceLamb(weights, lr=lr, **LAMB[case]), dtype, steps=12)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("weight_decay", [0.0, 1e-10, 0.1])
@pytest.mark.parametrize("size", [1, 4, 12, 13, 23])
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1.0, 1e18])
def test_tiles_and_rows_of_every_length_and_magnitude_equal_the_readable_form(size, weight_decay, scale):
    """Squares of 1e-25 are zero in float32, those of 1e18 add up to infinity."""
    torch.manual_seed(size)
    start, grads = torch.randn(size, size) * scale, torch.randn(5, size, size) * (scale or 1.0)
    ends = []
    for use_foreach in (False, True):
        weight = nn.Parameter(start.clone())
        options = {"exempt_1d": False, "weight_decay": weight_decay, "eps": 1e-6 * (scale or 1.0)}
        optimizer = Lamb([("w", weight)], lr=0.1, foreach=use_foreach, fused=False, **options)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        ends.append({"w": weight.detach() / (scale or 1.0), "ratio": optimizer.trust_ratios["w"] / (scale or 1.0)})
    assert_close(ends[1], {name: to_numpy(value) for name, value in ends[0].items()}, "float32")


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_tile_spreads_as_in_the_readable_form(value):
    ends = []
    for use_foreach in (False, True):
        weight = nn.Parameter(torch.arange(1.0, 31.0).view(5, 6))
        weight.grad = torch.ones(5, 6)
        weight.grad[2, 3] = value
        optimizer = Lamb([("w", weight)], lr=0.1, foreach=use_foreach, fused=False)
        optimizer.step()
        ends.append((weight.detach().isnan(), optimizer.state[weight]["exp_avg"].isfinite()))
    assert all(torch.equal(one, other) for one, other in zip(*ends))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("case", LARS)
def test_lars_in_tiles_equals_reference_to_1e_12(case):
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer = Lars(named(parameters), lr=1.0, foreach=True, **LARS[case])
    walk_together(optimizer, parameters, ReferenceLars(weights, lr=1.0, **LARS[case]), "float64", steps=12)


def large_parameters(dtype):
    """A plain, a transposed and a channels_last layer above the tile size, and a small one between them."""
    torch.manual_seed(5)
    return {
        "plain": nn.Parameter(torch.randn(SIZE, SIZE, dtype=dtype)),
        "small": nn.Parameter(torch.randn(3, 3, dtype=dtype)),
        "transposed": nn.Parameter(torch.randn(SIZE, SIZE + 1, dtype=dtype).t()),
        "image": nn.Parameter(torch.randn(64, 64, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)),
        "gapped": nn.Parameter(torch.randn(SIZE, SIZE + 8, dtype=dtype)[:, :SIZE]),  # not dense: rows have gaps
    }


@FORMS
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_large_layers_of_every_memory_format_equal_reference(norm, use_foreach):
    parameters = large_parameters(torch.float64)
    weights = {name: to_numpy(p) for name, p in parameters.items()}
    optimizer = Lamb(named(parameters), lr=0.01, norm=norm, foreach=use_foreach, max_grad_norm=10.0)
    reference = ReferenceLamb(weights, lr=0.01, norm=norm, max_grad_norm=10.0)
    for step in range(3):
        for index, parameter in enumerate(parameters.values()):
            grad = torch.randn(parameter.shape, dtype=torch.float64)
            # autograd may deliver a gradient with other strides than the weight has
            parameter.grad = torch.empty_like(parameter).copy_(grad) if (step + index) % 2 else grad
        reference.step({name: to_numpy(p.grad) for name, p in parameters.items()})
        optimizer.step()
    assert_close(parameters, reference.weights, "float64")
    assert_close(optimizer.trust_ratios, reference.trust_ratios, "float64")


@FORMS
def test_norm_of_millions_of_float32_elements_is_right_to_1e_6(use_foreach):
    """torch adds float32 squares one after the other on a CPU: its norm of 23 million elements is off by 1e-3."""
    torch.manual_seed(5)
    weight = nn.Parameter(torch.rand(2048, 2048) + 0.5)
    weight.grad = torch.rand(2048, 2048) + 0.5
    expected = layer_norm(to_numpy(weight), "l2"), layer_norm(to_numpy(weight.grad), "l2")
    optimizer = Lamb([("w", weight)], foreach=use_foreach, max_grad_norm=1.0)
    optimizer.step()
    assert_close(optimizer.weight_norms["w"], expected[0], "float32")
    assert_close(optimizer.grad_norm, expected[1], "float32")


@pytest.mark.parametrize("ratio_bounds", [None, (0.5, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("norm_bounds", [None, (0.1, 10.0)])
def test_the_trust_ratio_of_numbers_is_that_of_tensors(norm_bounds, ratio_bounds):
    values = [0.0, 1e-300, 0.05, 1.0, 3.0, 1e300, float("inf"), float("nan")]
    weights, updates = (found.flatten() for found in torch.meshgrid([torch.tensor(values).double()] * 2, indexing="ij"))
    expected = equations.trust_ratio(weights, updates, norm_bounds, ratio_bounds)
    found = [
        equations.trust_ratio_of_numbers(weight, update, norm_bounds, ratio_bounds)
        for weight, update in zip(weights.tolist(), updates.tolist())
    ]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=0, equal_nan=True)
