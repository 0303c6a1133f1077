"""Parameters and state that somebody casts, moves, shares or lays out anew between two steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tolerances import assert_close

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import ConflictError
from lightning_lamb.optimizers import state

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "eager": {"foreach": False, "fused": False},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_form = pytest.mark.parametrize("form", FORMS)


def network(dtype: torch.dtype) -> torch.nn.Sequential:
    """Two layers, one of them a scalar's bias, and a 4-D weight for memory formats."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 1)).to(dtype)


def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step with gradients that do not depend on the weights' rounding."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        grad = torch.randn(parameter.shape, generator=draw)
        parameter.grad = torch.empty_like(parameter).copy_(grad)
    optimizer.step()


def check_state(optimizer: torch.optim.Optimizer, state_dtype: str | None = None) -> None:
    """Moments and masters are of the dtypes that the parameter asks for, and where it is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = optimizer.state[parameter]
            half = parameter.dtype in (torch.bfloat16, torch.float16)
            wanted = torch.float32 if half else parameter.dtype
            if state_dtype == "bfloat16" and parameter.dtype != torch.float64:
                wanted = torch.bfloat16
            assert found["exp_avg"].dtype == wanted
            assert found.get("exp_avg_sq", found["exp_avg"]).dtype == wanted
            assert ("master_weight" in found) == half
            if half:
                assert torch.equal(found["master_weight"].to(parameter.dtype), parameter.detach())


@every_form
@pytest.mark.parametrize("cls", [Lamb, Lars])
@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_state_follows_a_module_that_is_cast_between_steps(before, after, cls, form):
    """``model.double()`` after a step was a crash of the process, or NaN: the kernel read float32 moments as float64.
    What a cast should do: every form goes on as the readable one, with the digits that the module itself kept."""
    modules = {}
    for name in (form, "eager"):
        modules[name] = module = network(before)
        optimizer = cls(module.named_parameters(), lr=0.01, **FORMS[name])
        for seed in range(2):
            step(module, optimizer, seed)
        module.to(after)
        for seed in range(2, 5):
            step(module, optimizer, seed)
        check_state(optimizer)
        module.to(before)  # and back, to the roster of the beginning
        step(module, optimizer, 5)
        check_state(optimizer)
        assert all(float(optimizer.state[p]["step"]) == 6 for p in module.parameters())
    tolerance = {torch.bfloat16: "bf16 weight", torch.float16: "fp16 weight"}
    narrow = next((tolerance[dtype] for dtype in (before, after) if dtype in tolerance), "float32")
    for one, other in zip(modules[form].parameters(), modules["eager"].parameters(), strict=True):
        assert_close(one, other, narrow)


@every_form
@pytest.mark.parametrize("after", DTYPES, ids=str)
def test_narrow_moments_follow_a_cast(after, form):
    """``state_dtype="bfloat16"`` still holds after a cast; float64 parameters have float64 moments."""
    module = network(torch.float32)
    optimizer = Lamb(module.parameters(), lr=0.01, state_dtype="bfloat16", **FORMS[form])
    step(module, optimizer, 0)
    module.to(after)
    step(module, optimizer, 1)
    check_state(optimizer, "bfloat16")
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


@every_form
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16], ids=str)
def test_state_that_somebody_replaced_by_another_dtype_is_used_with_its_values(form, key, in_place, after):
    """``optimizer.state[p]["exp_avg"] = ...``, and ``.data = ...`` of it, which no object's identity tells of."""
    weights = []
    for name in (form, "eager"):
        module = network(torch.float32)
        optimizer = Lamb(module.parameters(), lr=0.01, **FORMS[name])
        for seed in range(2):
            step(module, optimizer, seed)
        for parameter in module.parameters():
            found = optimizer.state[parameter]
            other = found[key].bfloat16().to(after)
            if in_place:
                found[key].data = other
            else:
                found[key] = other
        for seed in range(2, 4):
            step(module, optimizer, seed)
        weights.append([parameter.detach().clone() for parameter in module.parameters()])
    for one, other in zip(*weights, strict=True):
        # bfloat16 moments in place of float32 ones: rounded after each step, or cast once
        assert_close(one, other, "float32" if after == torch.float64 else "bf16 weight")


def _share(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    module.share_memory()
    for found in optimizer.state.values():
        for value in found.values():
            value.share_memory_()


def _share_one_step_count(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    middle = list(module.parameters())[1]
    optimizer.state[middle]["step"].share_memory_()


def _channels_last(module: torch.nn.Module, _: torch.optim.Optimizer) -> None:
    module.to(memory_format=torch.channels_last)


def _swap(module: torch.nn.Module, _: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def _transposed_storage(module: torch.nn.Module, _: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def _state_layout(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    found = optimizer.state[next(module.parameters())]
    for key in ("exp_avg", "exp_avg_sq"):
        found[key].data = found[key].data.to(memory_format=torch.channels_last)


@every_form
@pytest.mark.parametrize(
    "change", [_share, _share_one_step_count, _channels_last, _swap, _transposed_storage, _state_layout]
)
def test_moved_and_re_laid_tensors_go_on_where_they_were(form, change):
    """The kernel asked for addresses once, and wrote to memory that was somebody else's by then."""
    module = network(torch.float32)
    optimizer = Lamb(module.parameters(), lr=0.01, **FORMS[form])
    for seed in range(2):
        step(module, optimizer, seed)
    twin = copy.deepcopy(module)
    other = Lamb(twin.parameters(), lr=0.01, **FORMS[form])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    change(module, optimizer)
    for seed in range(2, 5):
        step(module, optimizer, seed)
        step(twin, other, seed)
    for one, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert_close(one, expected, "float32")
        assert float(optimizer.state[one]["step"]) == 5


@every_form
@pytest.mark.parametrize("cls", [Lamb, Lars])
def test_a_parameter_that_changed_its_shape_is_refused_by_name(form, cls):
    """A vocabulary resized through ``.data``: the moments are of another shape."""
    module = torch.nn.Linear(3, 4)
    optimizer = cls(module.named_parameters(), lr=0.01, **FORMS[form])
    step(module, optimizer, 0)
    module.weight.grad = None
    module.weight.data = torch.ones(6, 3)
    module.bias.grad = None
    module.weight.grad = torch.ones(6, 3)
    with pytest.raises(ConflictError, match=r"weight: its exp_avg has shape \(4, 3\), the parameter \(6, 3\) by now"):
        optimizer.step()
    optimizer.state.pop(module.weight)
    optimizer.step()
    assert optimizer.state[module.weight]["exp_avg"].shape == (6, 3)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_follows_a_parameter_to_another_device(capturable, dtype):
    """``module.cuda()`` keeps the objects; "meta" stands for another device."""
    group = {"capturable": capturable, "state_dtype": None}
    found: dict[str, Any] = {}
    state.prepare(found, torch.nn.Parameter(torch.ones(3, 3, dtype=dtype)), group, True, "weight")
    state.prepare(found, torch.nn.Parameter(torch.ones(3, 3, dtype=dtype, device="meta")), group, True, "weight")
    step_count = found.pop("step")
    assert step_count.device.type == ("meta" if capturable else "cpu")
    assert {value.device.type for value in found.values()} == {"meta"}
