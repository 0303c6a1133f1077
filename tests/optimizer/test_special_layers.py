"""Parameters that are not one plain, always trained, contiguous matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import as_parameters, assert_identical, layer_weights, named, set_gradients
from reference import ReferenceLamb
from tolerances import assert_close, to_numpy
from torch import nn

from lightning_lamb import Lamb, Lars

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])


class TiedModel(nn.Module):
    """An embedding whose weight is also the output layer's, and a frozen layer between."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.output = nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(torch.tanh(self.frozen(self.embedding(tokens))))


@FORMS
def test_tied_weight_is_one_layer_with_the_summed_gradient_and_frozen_parameters_stay(foreach):
    model = TiedModel().double()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = Lamb(model.named_parameters(), lr=0.01, foreach=foreach)
    reference = ReferenceLamb({"embedding.weight": to_numpy(model.embedding.weight)}, lr=0.01)
    for step in range(20):
        optimizer.zero_grad()
        tokens = (torch.arange(5) + step) % 7
        nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
        reference.step({"embedding.weight": to_numpy(model.embedding.weight.grad)})
        optimizer.step()
        assert_close(optimizer.trust_ratios, reference.trust_ratios, "float64")
    assert_close(model.output.weight, reference.weights["embedding.weight"], "float64")
    assert_identical({k: p.detach() for k, p in model.named_parameters() if not p.requires_grad}, frozen)
    assert len(optimizer.state) == 1


@FORMS
@OPTIMIZERS
def test_step_without_any_gradient_does_nothing_and_creates_no_state(optimizer_class, foreach):
    parameters = as_parameters(layer_weights(), torch.float32)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optimizer_class(named(parameters), foreach=foreach, max_grad_norm=1.0)
    optimizer.step()
    assert_identical({name: p.detach() for name, p in parameters.items()}, before)
    assert len(optimizer.state) == 0
    assert optimizer.trust_ratios == {}


@FORMS
def test_step_is_counted_per_parameter(foreach):
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Lamb(parameters, foreach=foreach)
    for step in range(6):
        parameters[0].grad = torch.ones(2, 2)
        parameters[1].grad = torch.ones(2, 2) if step >= 4 else None
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in parameters] == [6.0, 2.0]
    for state in optimizer.state.values():
        assert (state["step"].dtype, state["step"].shape, state["step"].device.type) == (torch.float32, (), "cpu")


@FORMS
@OPTIMIZERS
def test_group_added_late_starts_with_its_own_step_count(optimizer_class, foreach):
    first, late = (nn.Parameter(torch.full((3, 3), 0.5, dtype=torch.float64)) for _ in range(2))
    alone = nn.Parameter(late.detach().clone())
    optimizer = optimizer_class([first], lr=0.1, foreach=foreach)
    control = optimizer_class([alone], lr=0.1, foreach=foreach)
    grads = [torch.randn(3, 3, dtype=torch.float64) for _ in range(10)]
    for step, grad in enumerate(grads):
        first.grad = grad.clone()
        if step == 5:
            optimizer.add_param_group({"params": [late]})
        if step >= 5:
            late.grad, alone.grad = grad.clone(), grad.clone()
            control.step()
        optimizer.step()
    assert_close(late, alone, "float64")
    assert optimizer.state[late]["step"].item() == 5


@FORMS
def test_all_zero_gradients_move_only_decayed_weights(foreach):
    """peers.md trap 4: u = wd*w, so the step is lr*||w|| whatever the decay is; without decay nothing moves."""
    decayed, free = (nn.Parameter(torch.full((2, 2), 2.0, dtype=torch.float64)) for _ in range(2))
    optimizer = Lamb([{"params": [decayed]}, {"params": [free], "weight_decay": 0.0}], lr=0.1, foreach=foreach)
    for parameter in (decayed, free):
        parameter.grad = torch.zeros(2, 2, dtype=torch.float64)
    optimizer.step()
    assert_close(decayed, np.full((2, 2), 2.0 * (1 - 0.1)), "float64")
    assert_identical(free.detach(), torch.full((2, 2), 2.0, dtype=torch.float64))


@FORMS
@OPTIMIZERS
def test_learning_rate_zero_moves_nothing_but_updates_the_moments(optimizer_class, foreach):
    parameters = as_parameters(layer_weights(), torch.float32)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = optimizer_class(named(parameters), lr=0.0, foreach=foreach)
    set_gradients(parameters, {name: torch.ones_like(p) for name, p in parameters.items()})
    optimizer.step()
    assert_identical({name: p.detach() for name, p in parameters.items()}, before)
    assert all(state["exp_avg"].count_nonzero() == state["exp_avg"].numel() for state in optimizer.state.values())


@FORMS
def test_zero_initialised_layer_starts_with_ratio_one_and_then_moves(foreach):
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Lamb([("w", weight)], lr=0.1, foreach=foreach, trust_ratio_bounds=(2.0, 3.0))
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert optimizer.trust_ratios["w"].item() == 1.0  # the bounds do not apply to an undefined ratio
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), -0.1))


@FORMS
@OPTIMIZERS
@pytest.mark.parametrize("clip", [{}, {"max_grad_norm": 0.01, "max_grad_value": 0.01}], ids=["unclipped", "clipped"])
def test_gradient_is_never_modified(optimizer_class, clip, foreach):
    parameters = as_parameters(layer_weights(), torch.float32)
    optimizer = optimizer_class(named(parameters), foreach=foreach, maximize=True, **clip)
    for _ in range(2):
        set_gradients(parameters, {name: torch.randn(p.shape) for name, p in parameters.items()})
        kept = {name: (p.grad, p.grad.clone()) for name, p in parameters.items()}
        optimizer.step()
        for name, (grad, copy) in kept.items():
            assert parameters[name].grad is grad
            assert_identical(grad, copy, name)


@FORMS
@OPTIMIZERS
def test_memory_format_of_weight_and_state_is_kept(optimizer_class, foreach):
    parameters = as_parameters(layer_weights(), torch.float32)
    strides = {name: p.stride() for name, p in parameters.items()}
    optimizer = optimizer_class(named(parameters), foreach=foreach)
    set_gradients(parameters, {name: torch.ones_like(p) for name, p in parameters.items()})
    optimizer.step()
    assert {name: p.stride() for name, p in parameters.items()} == strides
    for name in ("conv", "strided"):
        assert optimizer.state[parameters[name]]["exp_avg"].stride() == strides[name]


@FORMS
def test_gradient_with_other_strides_than_its_weight_gives_the_same_step(foreach):
    value, grad = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    weights = [nn.Parameter(value.clone()) for _ in range(2)]
    weights[0].grad, weights[1].grad = grad.clone(), grad.t().contiguous().t()
    for weight in weights:
        Lamb([weight], foreach=foreach).step()
    assert_close(weights[1], weights[0], "float64")


@FORMS
@OPTIMIZERS
def test_mixed_dtypes_in_one_group_each_step_in_their_own(optimizer_class, foreach):
    dtypes = (torch.bfloat16, torch.float64, torch.float32, torch.float64)
    together = [nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3).to(dtype)) for dtype in dtypes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer = optimizer_class(together, lr=0.1, foreach=foreach)
    controls = [optimizer_class([p], lr=0.1, foreach=foreach) for p in alone]
    for step in range(5):
        for one, other in zip(together, alone, strict=True):
            one.grad, other.grad = (torch.full((2, 3), 1.0 + step, dtype=one.dtype) for _ in range(2))
        optimizer.step()
        for control in controls:
            control.step()
    for one, other in zip(together, alone, strict=True):
        assert one.dtype == other.dtype
        assert_identical(one.detach(), other.detach())


@FORMS
def test_nan_gradient_spoils_only_its_own_layer_and_is_visible(foreach):
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = Lamb([("bad", weights[0]), ("good", weights[1])], lr=0.1, foreach=foreach)
    weights[0].grad, weights[1].grad = torch.full((2, 2), float("nan")), torch.ones(2, 2)
    optimizer.step()
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()
    assert optimizer.update_norms["bad"].isnan()


@FORMS
@pytest.mark.parametrize("size", [8, 600], ids=["small", "in tiles"])
def test_norms_of_huge_and_tiny_layers_neither_overflow_nor_vanish(size, foreach):
    """A float32 sum of squares overflows from |w| = 2e19 and is zero below 1e-23."""
    for scale in (1e25, 1e-30):
        weight = nn.Parameter(torch.full((size, size), scale))
        optimizer = Lamb([("w", weight)], lr=0.1, weight_decay=0.0, foreach=foreach)
        weight.grad = torch.ones(size, size)
        optimizer.step()
        assert_close(optimizer.weight_norms["w"], size * scale, "float32")
        assert_close(weight, np.full((size, size), 0.9 * scale), "float32")
