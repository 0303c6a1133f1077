"""Lamb and Lars behave as torch's own optimizers do: the checks of torch's generic optimizer tests, applied to ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from option_table import LAMB, LARS
from problems import as_parameters, assert_identical, layer_gradients, layer_weights, named, set_gradients, snapshot
from tolerances import assert_close
from torch import nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import UnsupportedGradientError

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
CASES = [(Lamb, name, options) for name, options in LAMB.items()] + [(Lars, n, o) for n, o in LARS.items()]


def trained(optimizer_class, steps=3, dtype=torch.float32, **options):
    """Parameters by name and an optimizer that has taken some steps on them."""
    parameters = as_parameters(layer_weights(), dtype)
    optimizer = optimizer_class(named(parameters), **options)
    for grads in layer_gradients(steps, dtype):
        set_gradients(parameters, grads)
        optimizer.step()
    return parameters, optimizer


def small(optimizer_class, **options):
    """One 2x2 parameter with a gradient, and its optimizer."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    weight.grad = torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    return weight, optimizer_class([weight], **options)


@pytest.mark.parametrize(("optimizer_class", "case", "options"), CASES, ids=[f"{c.__name__}-{n}" for c, n, _ in CASES])
def test_foreach_equals_for_loop(optimizer_class, case, options):
    loop, _ = trained(optimizer_class, steps=7, dtype=torch.float64, foreach=False, **options)
    lists, _ = trained(optimizer_class, steps=7, dtype=torch.float64, foreach=True, **options)
    assert_close(lists, loop, "float64")


@FORMS
@OPTIMIZERS
def test_tensor_learning_rate_equals_float(optimizer_class, foreach):
    as_float, _ = trained(optimizer_class, dtype=torch.float64, foreach=foreach, lr=0.03125)
    for tensor in (torch.tensor(0.03125), torch.tensor([0.03125])):
        as_tensor, optimizer = trained(optimizer_class, dtype=torch.float64, foreach=foreach, lr=tensor)
        assert_close(as_tensor, as_float, "float64")
        assert optimizer.param_groups[0]["lr"] is tensor


@FORMS
def test_tensor_learning_rate_changed_in_place_is_used_at_the_next_step(foreach):
    weight, optimizer = small(Lamb, lr=torch.tensor(0.1), foreach=foreach)
    optimizer.param_groups[0]["lr"].fill_(0.0)
    before = weight.detach().clone()
    optimizer.step()
    assert_identical(weight.detach(), before)


@FORMS
@OPTIMIZERS
def test_maximize_equals_minimize_of_the_negated_gradient(optimizer_class, foreach):
    up, optimizer_up = small(optimizer_class, foreach=foreach, maximize=True, max_grad_norm=0.2)
    down, optimizer_down = small(optimizer_class, foreach=foreach, max_grad_norm=0.2)
    down.grad.neg_()
    optimizer_up.step()
    optimizer_down.step()
    assert_identical(up.detach(), down.detach())


@OPTIMIZERS
def test_empty_parameter_list_and_duplicates_are_refused_as_torch_does(optimizer_class):
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer_class([])
    with pytest.raises(TypeError):
        optimizer_class(torch.ones(2, 2))
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer_class([{"params": [weight]}, {"params": [weight]}])
    with pytest.raises(ValueError, match="non-leaf"):
        optimizer_class([weight * 2])


@FORMS
@OPTIMIZERS
def test_group_without_parameters_is_allowed(optimizer_class, foreach):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = optimizer_class([{"params": []}, {"params": [weight]}], foreach=foreach, max_grad_norm=1.0)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert not weight.eq(1).any()
    optimizer.load_state_dict(optimizer.state_dict())


@FORMS
@OPTIMIZERS
def test_complex_and_sparse_gradients_are_refused_before_anything_changes(optimizer_class, foreach):
    good = nn.Parameter(torch.ones(2, 2))
    good.grad = torch.ones(2, 2)
    spoiled = nn.Embedding(4, 3, sparse=True)
    spoiled(torch.tensor([1])).sum().backward()
    optimizer = optimizer_class([("good", good), ("spoiled.weight", spoiled.weight)], foreach=foreach)
    with pytest.raises(UnsupportedGradientError, match=r"spoiled\.weight.*sparse=False"):
        optimizer.step()
    assert_identical(good.detach(), torch.ones(2, 2))
    assert len(optimizer.state) == 0

    complex_weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    complex_weight.grad = torch.ones_like(complex_weight)
    with pytest.raises(UnsupportedGradientError, match=r"wave\.weight.*view_as_real"):  # when built or when stepped
        optimizer_class([("good", good), ("wave.weight", complex_weight)], foreach=foreach).step()
    assert_identical(good.detach(), torch.ones(2, 2))


@FORMS
@OPTIMIZERS
def test_closure_is_called_once_with_grad_enabled_and_its_loss_returned(optimizer_class, foreach):
    weight, optimizer = small(optimizer_class, lr=0.1, foreach=foreach)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == 30.0
    assert weight.square().sum() < 30.0
    assert optimizer.step() is None


@OPTIMIZERS
def test_quadratic_loss_falls_with_a_torch_scheduler(optimizer_class):
    weight = nn.Parameter(torch.tensor([[1.5, -2.0], [0.5, 1.0]]))
    optimizer = optimizer_class([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


@OPTIMIZERS
def test_named_parameters_give_the_names_of_the_ratios_and_plain_ones_give_positions(optimizer_class):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.ones(1, 3)).sum().backward()
    by_name, by_position = optimizer_class(model.named_parameters()), optimizer_class(model.parameters())
    by_name.step()
    by_position.step()
    assert set(by_name.trust_ratios) == set(by_name.weight_norms) == set(by_name.update_norms)
    assert set(by_name.trust_ratios) == {"0.weight", "1.weight"}
    assert set(by_position.trust_ratios) == {"group0.param0", "group0.param2"}
    assert all(ratio.shape == () for ratio in by_name.trust_ratios.values())


@OPTIMIZERS
def test_ratios_are_of_the_last_step_and_empty_before_the_first(optimizer_class):
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    optimizer = optimizer_class([("a", parameters[0]), ("b", parameters[1])])
    assert optimizer.trust_ratios == {}
    parameters[0].grad = torch.ones(2, 2)
    optimizer.step()
    assert set(optimizer.trust_ratios) == {"a"}
    parameters[0].grad, parameters[1].grad = None, torch.ones(2, 2)
    optimizer.step()
    assert set(optimizer.trust_ratios) == {"b"}


@FORMS
@OPTIMIZERS
def test_grad_norm_is_the_unclipped_global_norm_only_where_clipping_was_asked_for(optimizer_class, foreach):
    weight, optimizer = small(optimizer_class, foreach=foreach)
    optimizer.step()
    assert optimizer.grad_norm is None
    weight, optimizer = small(optimizer_class, foreach=foreach, max_grad_norm=0.01)
    optimizer.step()
    assert_close(optimizer.grad_norm, weight.grad.norm(), "float32")
    assert_close(optimizer.global_grad_norm(), weight.grad.norm(), "float32")


@OPTIMIZERS
def test_step_hooks_run_around_the_step(optimizer_class):
    weight, optimizer = small(optimizer_class, lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    optimizer.step()
    assert_identical(seen[0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert_identical(seen[1], weight.detach())
    assert not seen[0].equal(seen[1])


@OPTIMIZERS
def test_zero_grad_as_in_torch(optimizer_class):
    weight, optimizer = small(optimizer_class)
    optimizer.zero_grad(set_to_none=False)
    assert_identical(weight.grad, torch.zeros(2, 2))
    optimizer.zero_grad()
    assert weight.grad is None


@OPTIMIZERS
def test_repr_shows_every_option_by_name(optimizer_class):
    text = repr(small(optimizer_class, trust_ratio_bounds=(0.25, 4.0))[1])
    assert text.startswith(optimizer_class.__name__)
    for option in ("lr", "weight_decay", "norm", "exempt_1d", "max_grad_norm", "adapt", "(0.25, 4.0)"):
        assert option in text


@FORMS
@OPTIMIZERS
def test_pickled_and_deep_copied_optimizers_continue_bitwise(optimizer_class, foreach):
    # weights travel with the optimizer in both, so the copy steps its own parameters
    parameters, optimizer = trained(optimizer_class, foreach=foreach, lr=0.1, weight_norm_bounds=(0.1, 10.0))
    copies = [pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)]
    expected = None
    for one in (optimizer, *copies):
        for group in one.param_groups:
            for index, parameter in enumerate(group["params"]):
                parameter.grad = torch.full_like(parameter, 0.5 + index)
        one.step()
        expected = expected or snapshot(one)
        assert_identical(snapshot(one), expected)
        assert set(one.trust_ratios) == set(optimizer.trust_ratios)
    copied_weight = copies[1].param_groups[0]["params"][0]
    assert copied_weight is not parameters["matrix"]


@OPTIMIZERS
def test_default_dtype_float64_does_not_leak_into_float32_training(optimizer_class):
    parameters = as_parameters(layer_weights(), torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = optimizer_class(named(parameters))
        for grads in layer_gradients(3, torch.float32):
            set_gradients(parameters, grads)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    control, other = trained(optimizer_class)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert_identical(snapshot(optimizer)["state"], snapshot(other)["state"])
    assert_identical({k: p.detach() for k, p in parameters.items()}, {k: p.detach() for k, p in control.items()})


def test_foreach_needs_no_more_than_two_temporaries_of_the_model_size():
    """torch bounds the memory of its foreach forms; ours must not regress into one list per operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestLive(TorchDispatchMode):
        """Bytes of all storages born inside the mode and still alive, at their maximum."""

        def __init__(self):
            super().__init__()
            self.live, self.largest = {}, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            import weakref

            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.live.setdefault(storage.data_ptr(), (weakref.ref(storage), storage.nbytes()))
            self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if ref() is not None and k not in old}
            self.largest = max(self.largest, sum(size for _, size in self.live.values()))
            return result

    parameters = [nn.Parameter(torch.ones(64, 64)) for _ in range(8)]
    optimizer = Lamb(parameters, foreach=True)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(64, 64)
        old = {p.untyped_storage().data_ptr() for p in parameters} | {
            p.grad.untyped_storage().data_ptr() for p in parameters
        }
        old |= {v.untyped_storage().data_ptr() for s in optimizer.state.values() for v in s.values()}
        with LargestLive() as memory:
            optimizer.step()
    assert memory.largest <= 2.1 * sum(p.nbytes for p in parameters)


@OPTIMIZERS
@pytest.mark.parametrize("number", ["float32", "float64", "int64"])
def test_numbers_of_numpy_are_numbers_as_for_torchs_optimizers(optimizer_class, number, tmp_path):
    """float32 was refused as no number; float64 came into state dicts, which weights_only=True then refused to load."""
    numpy = pytest.importorskip("numpy")
    one = getattr(numpy, number)(1)
    parameters, optimizer = trained(optimizer_class, lr=one, weight_decay=one)
    same, _ = trained(optimizer_class, lr=1.0, weight_decay=1.0)
    assert_identical(parameters, same)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    (group,) = torch.load(tmp_path / "state.pt", weights_only=True)["param_groups"]
    assert type(group["lr"]) is float
