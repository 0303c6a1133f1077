"""State dicts: continuation is bitwise, torch's hooks work, and a dict that does not fit changes nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from problems import as_parameters, assert_identical, layer_gradients, layer_weights, named, set_gradients, snapshot
from torch import nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import StateDictError

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def walk(optimizer, parameters, gradients):
    for grads in gradients:
        set_gradients(parameters, grads)
        optimizer.step()


def through_a_file(state_dict):
    """As a checkpoint does it, with the loader that runs no code."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@FORMS
@OPTIMIZERS
@DTYPES
def test_resumed_run_equals_uninterrupted_run_bitwise(optimizer_class, dtype, foreach):
    gradients = list(layer_gradients(12, dtype))
    parameters = as_parameters(layer_weights(), dtype)
    options = {"lr": 0.01, "foreach": foreach, "max_grad_norm": 2.0, "trust_ratio_bounds": (0.01, 10.0)}
    optimizer = optimizer_class(named(parameters), **options)
    walk(optimizer, parameters, gradients[:5])
    saved = through_a_file(optimizer.state_dict())
    resumed_parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    resumed = optimizer_class(named(resumed_parameters), foreach=foreach)  # other options: the saved ones win
    resumed.load_state_dict(saved)
    assert_identical(snapshot(resumed), snapshot(optimizer))
    walk(optimizer, parameters, gradients[5:])
    walk(resumed, resumed_parameters, gradients[5:])
    assert_identical(snapshot(resumed), snapshot(optimizer))


@OPTIMIZERS
def test_state_holds_the_documented_keys_and_the_dict_is_only_plain_types(optimizer_class):
    moments = ["exp_avg", "exp_avg_sq"] if optimizer_class is Lamb else ["exp_avg"]
    for dtype, expected in ((torch.float32, ["step", *moments]), (torch.bfloat16, ["step", *moments, "master_weight"])):
        weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        weight.grad = torch.ones(2, 2, dtype=dtype)
        optimizer = optimizer_class([weight])
        optimizer.step()
        assert set(optimizer.state[weight]) == set(expected)
        assert set(optimizer.state_dict()) == {"state", "param_groups"}
        through_a_file(optimizer.state_dict())


@OPTIMIZERS
def test_state_dict_is_not_changed_by_loading_or_by_later_steps(optimizer_class):
    parameters = as_parameters(layer_weights(), torch.float32)
    optimizer = optimizer_class(named(parameters))
    gradients = list(layer_gradients(4, torch.float32))
    walk(optimizer, parameters, gradients[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    walk(optimizer, parameters, gradients[2:])
    assert_identical(saved["param_groups"], kept["param_groups"])
    assert list(saved["state"]) == list(kept["state"])


def test_state_of_parameters_without_gradients_so_far_may_be_missing():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    optimizer = Lamb(parameters)
    parameters[1].grad = torch.ones(2, 2)
    optimizer.step()
    fresh = Lamb([nn.Parameter(torch.ones(2, 2)) for _ in range(3)])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert len(fresh.state) == 1
    for parameter in fresh.param_groups[0]["params"]:
        parameter.grad = torch.ones(2, 2)
    fresh.step()
    assert [fresh.state[p]["step"].item() for p in fresh.param_groups[0]["params"]] == [1.0, 2.0, 1.0]


def test_step_saved_as_a_plain_number_is_loaded_as_a_cpu_tensor():
    """DeepSpeed and old checkpoints hold an int."""
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = Lamb([weight])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 7
    optimizer.load_state_dict(saved)
    optimizer.step()
    step = optimizer.state[weight]["step"]
    assert (step.item(), step.dtype, step.device.type) == (8.0, torch.float32, "cpu")


@OPTIMIZERS
def test_state_dict_hooks_run_in_torchs_order(optimizer_class):
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = optimizer_class([weight], lr=0.25)
    optimizer.step()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append("after save") or {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(f"before load {saved.pop('extra')}"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before save", "after save", "before load 1", "after load"]


def test_load_pre_hook_may_repair_a_dict_that_would_otherwise_be_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = Lamb([weight])
    optimizer.step()
    good, bad = optimizer.state_dict(), torch.optim.AdamW([weight]).state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda *_: good)
    optimizer.load_state_dict(bad)
    assert optimizer.state[weight]["step"].item() == 1.0


def foreign_dicts():
    """Name -> (maker of a dict that does not belong to Lamb on a (2, 3) and a (4,) parameter)."""

    def stepped(optimizer_class, shapes=((2, 3), (4,)), groups=1, **options):
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        split = [{"params": [p]} for p in parameters] if groups == 2 else parameters
        optimizer = optimizer_class(split, **options)
        optimizer.step()
        return optimizer.state_dict()

    def without(key):
        saved = copy.deepcopy(stepped(Lamb))
        del saved["state"][1][key]
        return saved

    def truncated():
        saved = copy.deepcopy(stepped(Lamb))
        saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"][:1]
        return saved

    return {
        "AdamW": lambda: stepped(torch.optim.AdamW),
        "Adam, nothing stepped": lambda: torch.optim.Adam(
            [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))]
        ).state_dict(),
        "SGD": lambda: stepped(torch.optim.SGD, momentum=0.9),
        "Lars": lambda: stepped(Lars),
        "transposed": lambda: stepped(Lamb, shapes=((3, 2), (4,))),
        "same number of elements": lambda: stepped(Lamb, shapes=((6,), (4,))),
        "fewer parameters": lambda: stepped(Lamb, shapes=((2, 3),)),
        "more parameters": lambda: stepped(Lamb, shapes=((2, 3), (4,), (5,))),
        "other groups": lambda: stepped(Lamb, groups=2),
        "second moment missing": lambda: without("exp_avg_sq"),
        "step missing": lambda: without("step"),
        "one moment cut": truncated,
        "not a state dict": lambda: {"weights": 1},
    }


@FORMS
@pytest.mark.parametrize("case", foreign_dicts())
def test_foreign_state_dict_is_refused_and_nothing_changed(case, foreach):
    parameters = [nn.Parameter(torch.full((2, 3), 2.0)), nn.Parameter(torch.full((4,), 2.0))]
    optimizer = Lamb(parameters, lr=0.125, foreach=foreach)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = snapshot(optimizer)
    foreign = foreign_dicts()[case]()
    with pytest.raises(StateDictError):
        optimizer.load_state_dict(foreign)
    assert_identical(snapshot(optimizer), before)


def test_lamb_dict_is_refused_by_lars():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    lamb, lars = Lamb([weight]), Lars([weight])
    lamb.step()
    with pytest.raises(StateDictError, match="Lars"):
        lars.load_state_dict(lamb.state_dict())
    assert len(lars.state) == 0


def test_refusal_names_what_differs_and_what_to_do():
    parameters = [("body.weight", nn.Parameter(torch.ones(2, 3)))]
    optimizer = Lamb(parameters)
    other = Lamb([nn.Parameter(torch.ones(3, 2))])
    other.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    other.step()
    with pytest.raises(StateDictError, match=r"body\.weight.*\(3, 2\).*\(2, 3\)|body\.weight.*\(2, 3\).*\(3, 2\)"):
        optimizer.load_state_dict(other.state_dict())
    with pytest.raises(StateDictError, match=r"not one of Lamb.*fresh state"):
        optimizer.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.ones(2, 3))]).state_dict())
