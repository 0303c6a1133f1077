"""A loss scale under sharding: an overflow that one rank found is no step on any rank."""

from __future__ import annotations

import torch
from distributed import rank, run_ranks

from lightning_lamb import Lamb


def step_with_an_overflow_on_the_last_rank(_: None) -> list[bool]:
    """Per step, whether this rank's piece moved; the second step has an overflow elsewhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = Lamb([weight], fused=True)
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
    return [*moved, float(optimizer.state[weight]["step"]) == 2]


def test_an_overflow_on_one_rank_is_no_step_on_any():
    assert run_ranks(step_with_an_overflow_on_the_last_rank, 2, None) == [[True, False, True, True]] * 2
