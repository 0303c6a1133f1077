"""Views of any kind, any number of threads, gradients left alone, and no temporary of a layer's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from lightning_lamb import Lamb
from lightning_lamb.kernels import cpu, eager
from tests.kernels.batches import Case, assert_as_eager, batch_of, bounds, copy_of, scales, tensors_of

FUSED = pytest.mark.parametrize("kernel", ["cpu", "triton"], indirect=True)
ALL = pytest.mark.parametrize("kernel", ["foreach", "cpu", "triton"], indirect=True)


def strided(*shape: int) -> torch.Tensor:
    """Every second column."""
    return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64)[..., ::2]


VIEWS = {
    "channels last": lambda: torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 5, dtype=torch.float64).t(),
    "every second column": lambda: strided(6, 9),
    "a column": lambda: torch.randn(50, 3, dtype=torch.float64)[:, 1],
    "misaligned": lambda: torch.randn(1031, dtype=torch.float64)[3:],
    "rows of a larger matrix": lambda: torch.randn(40, 33, dtype=torch.float64)[3:19],
    "a large strided one": lambda: strided(300, 300),
}


@ALL
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("calls", [1, 2])
def test_views_of_any_kind_and_what_is_around_them_stays(kernel, view, calls):
    case = Case()
    weight = VIEWS[view]()
    base = weight if weight._base is None else weight._base
    outside = torch.ones(base.shape, dtype=torch.bool)
    outside.as_strided(weight.shape, weight.stride(), weight.storage_offset()).fill_(False)
    around = base[outside].clone()
    batch = batch_of(case, [weight, torch.randn(3, dtype=torch.float64)], step=3)
    expected = [torch.clone(part[0]) for part in (batch.weights, batch.grads, batch.moments1, batch.moments2)]
    reference = batch_of(case, [expected[0].contiguous(), batch.weights[1].clone()], step=3)
    eager.step(reference, scales(case, reference), *bounds(case))
    if calls == 1:
        kernel.step(batch, scales(case, batch), *bounds(case))
        assert_close(batch.weights[0], reference.weights[0], "float64")
        assert_close(batch.moments2[0], reference.moments2[0], "float64")
    else:
        again = batch_of(case, [expected[0], batch.weights[1].clone()], step=3)
        assert_as_eager(kernel, case, again, "float64", calls=2)
    assert torch.equal(base[outside], around)


@FUSED
def test_gradients_and_moments_laid_out_unlike_their_weight(kernel):
    case = Case()
    batch = batch_of(case, [torch.randn(6, 8, dtype=torch.float64), torch.randn(5, dtype=torch.float64)], step=3)
    batch.grads[0] = batch.grads[0].t().contiguous().t()
    batch.moments1[0] = batch.moments1[0].t().contiguous().t()
    grads = [grad.clone() for grad in batch.grads]
    assert_as_eager(kernel, case, batch, "float64")
    assert all(torch.equal(*pair) for pair in zip(batch.grads, grads, strict=True))


@FUSED
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned_by_single_elements_in_float32(kernel, offset):
    case = Case(dtype=torch.float32)
    assert_as_eager(kernel, case, batch_of(case, [torch.randn(2100)[offset:]], step=3), "float32")


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_one_to_nine_threads_end_bit_for_bit_in_the_same_place(threads, norm, state_dtype):
    case = Case({"norm": norm}, dtype=torch.float32, state_dtype=state_dtype)
    results = []
    for number in (1, 2, 3, 9):
        threads(number)
        batch = batch_of(case, [torch.full((size,), 0.5) for size in (3, 70000, 1000, 200001, 65536)], step=3)
        norms = cpu.step(batch, scales(case, batch), *bounds(case))
        results.append([*tensors_of(batch), *norms])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


@FUSED
@pytest.mark.parametrize("size", [50, 70000])
def test_moments_in_bfloat16_are_rounded_by_the_same_random_bits(kernel, size):
    if size > 50 and kernel.__name__.endswith("triton"):
        size = 9000
    case = Case(dtype=torch.float32, state_dtype=torch.bfloat16)
    batch = batch_of(case, [torch.randn(size)], step=3)
    expected = copy_of(batch)
    for each, one in ((kernel, batch), (eager, expected)):
        each.step(one, scales(case, one), *bounds(case))
    for one, other in zip((batch.moments1[0], batch.moments2[0]), (expected.moments1[0], expected.moments2[0])):
        # A float32 result that differs in its last bit may fall on the other side: once in 2^16 elements or so.
        assert (one != other).sum() <= 2 + size // 2000
        assert_close(one, other, "bf16 weight")
    assert_close(batch.weights[0], expected.weights[0], "bf16 weight")


@FUSED
def test_clipping_is_folded_in_and_gradients_stay_as_they_are(kernel):
    case = Case({"max_grad_value": 0.3, "maximize": True}, dtype=torch.float32)
    batch = batch_of(case, [torch.randn(40, 40), torch.randn(9)], step=3)
    batch.grad_scale = torch.tensor(0.25, dtype=torch.float64)
    grads = [grad.clone() for grad in batch.grads]
    versions = [grad._version for grad in batch.grads]
    assert_as_eager(kernel, case, batch, "float32")
    assert all(torch.equal(*pair) for pair in zip(batch.grads, grads, strict=True))
    assert versions == [grad._version for grad in batch.grads]


def test_a_gradient_of_another_shape_is_refused_before_memory_is_touched():
    case = Case(dtype=torch.float32)
    batch = batch_of(case, [torch.randn(5, 3)])
    batch.grads[0] = torch.randn(5, 2)
    before = batch.weights[0].clone()
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\).*\(5, 2\)"):
        cpu.step(batch, [0.01], None, None)
    assert torch.equal(batch.weights[0], before)


def test_tensors_whose_memory_moved_since_the_last_step_are_followed():
    """``.data = ``, ``share_memory_()`` and loading replace memory behind tensors that stay the same objects."""
    weights = [torch.nn.Parameter(torch.randn(50, 3)) for _ in range(3)]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    moved, plain = Lamb(weights, fused=True), Lamb(copies, fused=True)
    for round_ in range(4):
        for one, other in zip(weights, copies):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        moved.step()
        plain.step()
        for one in weights:
            state = moved.state[one]
            if round_ == 0:
                one.data = one.data.clone()
            elif round_ == 1:
                state["exp_avg"].data = state["exp_avg"].data.clone()
            else:
                for value in state.values():
                    value.share_memory_()
    for one, other in zip(weights, copies):
        assert torch.equal(one, other)
        assert moved.state[one]["step"] == plain.state[other]["step"] == 4


def test_a_step_needs_less_than_a_hundredth_of_the_parameters_memory():
    """16 layers of 1000 x 1000: any temporary of a layer's size would be a sixteenth."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells a process its peak")
    root = Path(__file__).parents[2]
    script = root / "examples/benchmarks/peak_memory.py"
    command = [sys.executable, script, "--contender", "lightning_lamb Lamb fused", "--shapes", "16*1000x1000"]
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [*command, "--device", "cpu"], env=os.environ | environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["peak_extra"] < 0.01 * found["parameters"]
    assert found["state"] < 2.01 * found["parameters"]
