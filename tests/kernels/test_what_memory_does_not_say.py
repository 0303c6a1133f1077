"""Kernels that read memory directly, and tensors whose address and size do not say all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.batches import Case, assert_as_eager, batch_of, copy_of, in_two_calls, tensors_of
from tolerances import assert_close

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import ConflictError
from lightning_lamb.kernels import eager
from lightning_lamb.kernels.unchanged import Unchanged

EVERY = pytest.mark.parametrize("kernel", ["eager", "foreach", "cpu", "triton"], indirect=True)
LISTS = ("weights", "grads", "moments1", "moments2")
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "eager": {"foreach": False, "fused": False},
}


def negated(values: torch.Tensor) -> torch.Tensor:
    """The same values, kept as their negative under torch's lazy negation bit."""
    lazy = torch._neg_view(values.neg())
    assert lazy.is_neg() or not values.numel()
    return lazy


@EVERY
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (4, 2), (200, 200)])
@pytest.mark.parametrize("which", LISTS)
def test_the_lazy_negation_bit_is_obeyed_in_every_tensor(kernel, which, shape):
    """`torch.view_as_complex(p).conj().imag` leaves gradients whose memory has the other sign. The compiled kernel read
    the memory of one-element gradients, which are contiguous whatever their strides, and ran uphill."""
    case = Case(dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    batch = batch_of(case, [torch.randn(shape, generator=draw), torch.randn(5, 5, generator=draw)], step=2)
    plain = copy_of(batch)
    getattr(batch, which)[0] = negated(getattr(batch, which)[0])
    for _ in range(2):
        for one, kind in ((batch, kernel), (plain, eager)):
            kind.step(one, [0.01, 0.01], None, None)
    for one, other in zip(tensors_of(batch), tensors_of(plain), strict=True):
        assert_close(one, other, "float32", which)


@EVERY
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("which", LISTS)
@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.t,
        lambda t: torch._neg_view(t),
        lambda t: t.double(),
        lambda t: t.clone(),
        lambda t: t.share_memory_(),
    ],
    ids=["strides", "negation", "dtype", "address", "shared"],
)
def test_tensors_that_change_under_the_same_object_are_seen_at_the_next_step(kernel, which, change, calls):
    """Nothing tells a kernel of ``tensor.data = ...``: the object, and here and there the address, stay the same."""
    if which in ("weights", "moments1", "moments2") and change(torch.ones(1)).dtype == torch.float64:
        pytest.skip("the optimizer casts state before a kernel sees it: tests/optimizer/test_casts.py")
    case = Case(dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    batch = batch_of(case, [torch.randn(6, 6, generator=draw), torch.randn(3, 3, generator=draw)], step=2)
    for moment in batch.moments2:
        moment.add_(1)
    kernel.step(batch, [0.01, 0.01], None, None)
    target = getattr(batch, which)[0]
    changed = change(target.detach().clone())
    if which == "moments2" and bool((changed < 0).any()):
        changed = torch._neg_view(target.neg())
    target.data = changed
    expected = copy_of(batch)
    if calls == 2:
        in_two_calls(kernel, case, batch)
        in_two_calls(eager, case, expected)
    else:
        kernel.step(batch, [0.01, 0.01], None, None)
        eager.step(expected, [0.01, 0.01], None, None)
    for one, other in zip(tensors_of(batch), tensors_of(expected), strict=True):
        assert_close(one, other, "float32", which)


@pytest.mark.parametrize("kernel", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("which", LISTS)
def test_a_tensor_without_memory_is_an_error_instead_of_a_crash(kernel, which):
    """FSDP resizes the storage of what it does not need to nothing; its address is then 0."""
    case = Case(dtype=torch.float32)
    batch = batch_of(case, [torch.ones(4, 4), torch.ones(3)], step=2)
    for _ in range(2):  # found at first sight, and when it happens later
        getattr(batch, which)[0].untyped_storage().resize_(0)
        with pytest.raises(ConflictError, match=r"shape \(4, 4\) has no memory any more"):
            kernel.step(batch, [0.01, 0.01], None, None)
        getattr(batch, which)[0].untyped_storage().resize_(64)
        getattr(batch, which)[0].fill_(1.0)
        kernel.step(batch, [0.01, 0.01], None, None)


@pytest.mark.parametrize("kernel", ["cpu", "triton"], indirect=True)
def test_empty_layers_have_no_memory_and_no_error(kernel):
    """A layer without elements has address 0, rightly."""
    case = Case(dtype=torch.float32)
    assert_as_eager(kernel, case, batch_of(case, [torch.ones(0, 3), torch.ones(3, 3)], step=2), "float32")


@pytest.mark.parametrize("slow", [False, True], ids=["torch's check", "without it"])
def test_unchanged_sees_each_fact(monkeypatch, slow):
    """Type, dtype, shape, strides and lazy bits; with torch's check in C++ and without."""
    if slow:
        monkeypatch.setattr("lightning_lamb.kernels.unchanged._guards", lambda tensors: None)
    tensors = [torch.randn(4, 4), torch.nn.Parameter(torch.randn(2))]
    known = Unchanged(tensors)
    assert known.holds(tensors)
    assert known.holds([torch.randn(4, 4), torch.nn.Parameter(torch.randn(2))])
    assert not known.holds(tensors[:1])
    for other in (
        tensors[0].t(),
        tensors[0].double(),
        tensors[0][:3],
        torch._neg_view(tensors[0]),
        tensors[0].to("meta"),
    ):
        assert not known.holds([other, tensors[1]])
    assert not known.holds([tensors[0], torch.randn(2)])
    assert Unchanged([]).holds([])


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("cls", [Lamb, Lars])
@pytest.mark.parametrize("extra", [{}, {"max_grad_norm": 0.5}, {"max_grad_value": 0.1}, {"norm": "l1"}], ids=str)
def test_nothing_is_made_on_the_default_device(options, cls, extra):
    """``torch.set_default_device("meta")`` stands for "cuda": what a step makes without naming a device lands there. It
    was a crash of the process in the compiled kernel, and a ZeroDivisionError in others."""

    def trained(device: str) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(0)
        shapes = [(3, 3), (3,), (300, 300), ()]
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw, device="cpu")) for shape in shapes]
        grads = [[torch.randn(shape, generator=draw, device="cpu") for shape in shapes] for _ in range(3)]
        with torch.device(device):
            optimizer = cls(parameters, lr=0.01, **options, **extra)
            for step in grads:
                for parameter, grad in zip(parameters, step):
                    parameter.grad = grad
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            assert optimizer.global_grad_norm().device.type == "cpu"
            assert all(ratio.device.type == "cpu" for ratio in optimizer.trust_ratios.values())
            assert cls(parameters).global_grad_norm().device.type == "cpu"
        return [parameter.detach() for parameter in parameters]

    for one, other in zip(trained("meta"), trained("cpu"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("default", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"foreach": False, "fused": False}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("cls", [Lamb, Lars])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_cuda_tensors_step_whatever_the_default_device(default, options, cls, dtype):
    """Torch's FakeTensorMode has the device rules of CUDA without a GPU: no operation may mix devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device(default):
        shapes = [(8, 8), (8,)]
        parameters = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
        optimizer = cls(parameters, lr=0.1, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        assert optimizer.state[parameters[0]]["exp_avg"].device.type == "cuda"
        assert all(norm.device.type == "cuda" for norm in optimizer.weight_norms.values())
