"""A loss scale under sharding: an overflow that one rank found is no step on any rank."""

from __future__ import annotations

import pytest
import torch
from distributed import rank, run_ranks

from lightning_lamb import Lamb


def step_with_an_overflow_on_the_last_rank(max_grad_value: float | None) -> list[bool]:
    """Per step, whether this rank's piece moved; the second step has an overflow elsewhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = Lamb([weight], fused=True, max_grad_value=max_grad_value)
    moved = []
    for overflow in (False, True, False):
        local = torch.full((2, 3), 1024.0)
        if overflow and rank() == 1:
            local[0, 0] = torch.inf
        weight.grad = DTensor.from_local(local, mesh, [Shard(0)])
        optimizer.grad_scale = torch.tensor(1024.0)
        optimizer.found_inf = torch.tensor(float(overflow and rank() == 1))
        before = weight.to_local().detach().clone()
        optimizer.step()
        moved.append(not torch.equal(weight.to_local(), before))
        assert optimizer.step_was_skipped is overflow
    return [*moved, float(optimizer.state[weight]["step"]) == 2]


@pytest.mark.parametrize("max_grad_value", [None, 1.0])
def test_an_overflow_on_one_rank_is_no_step_on_any(max_grad_value):
    """Infinite gradients were bounded by ``max_grad_value`` before somebody asked whether they are finite: a step."""
    found = run_ranks(step_with_an_overflow_on_the_last_rank, 2, max_grad_value)
    assert found == [[True, False, True, True]] * 2
