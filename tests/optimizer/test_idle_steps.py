"""Steps that find no gradient: as in torch's optimizers, unless a module is seen to train others in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import rank, run_ranks
from torch import nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import UnknownShardError
from lightning_lamb.optimizers import ShardedStateOptimizer


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
@pytest.mark.parametrize("idle", [1, 2, 5])
def test_steps_before_the_first_gradient_do_nothing(optimizer_class, idle):
    """A training step that returns nothing at the start was taken for an optimizer of replaced parameters. Ten of
    Lightning's own tests do so."""
    module = nn.Linear(3, 3)
    optimizer = optimizer_class(module.named_parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for _ in range(idle):
        optimizer.step(lambda: None)
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), before, strict=True))
    assert not optimizer.state
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert float(optimizer.state[module.weight]["step"]) == 1


class Heads(nn.Module):
    """Heads that take turns: a rank may hold the state of one that is not used yet."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])

    def forward(self, x: torch.Tensor, task: int) -> torch.Tensor:
        """Through one head."""
        return self.heads[task](x)


def train_heads_in_turn(kind: str) -> list[float]:
    """The heads' norms after four steps, of which the first use one head only."""
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    module = DistributedDataParallel(Heads(), find_unused_parameters=True)
    build: dict[str, Any] = {
        "Lamb": lambda: Lamb(module.parameters(), lr=0.01),
        "ZeroRedundancyOptimizer": lambda: ZeroRedundancyOptimizer(module.parameters(), Lamb, lr=0.01),
        "ShardedStateOptimizer": lambda: ShardedStateOptimizer(module.parameters(), Lamb, lr=0.01),
    }
    optimizer = build[kind]()
    draw = torch.Generator().manual_seed(rank())
    for task in (0, 0, 0, 1):
        optimizer.zero_grad()
        module(torch.randn(4, 8, generator=draw), task).square().sum().backward()
        optimizer.step()
    return [round(float(parameter.detach().norm()), 5) for parameter in module.parameters()]


def test_a_rank_whose_layers_are_idle_in_the_first_batches_trains():
    """Rank 1 of torch's ZeroRedundancyOptimizer raised, and rank 0 waited for it."""
    found = {
        kind: run_ranks(train_heads_in_turn, 2, kind)
        for kind in ("Lamb", "ZeroRedundancyOptimizer", "ShardedStateOptimizer")
    }
    for kind, norms in found.items():
        assert norms[0] == norms[1], kind
        assert norms[0] == pytest.approx(found["Lamb"][0], rel=1e-4), kind


def sharded_after_the_optimizer(names: bool) -> list[str]:
    """What the first steps say where FSDP2 replaced the parameters, and beside a module that has its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = Lamb(module.named_parameters() if names else module.parameters(), lr=0.1)
    other, raw = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))
    bystanders = [Lamb(other.named_parameters()), Lamb([("raw", raw)]), Lamb([raw])]
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    module(torch.ones(2, 4)).sum().backward()
    for bystander in bystanders:  # no gradient yet; beside a sharded module that is no evidence
        bystander.step()
        bystander.step()
    try:
        optimizer.step()
    except UnknownShardError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("names", [True, False])
def test_parameters_that_fsdp2_replaced_are_still_an_error(names):
    """What the guard is for: the stock LightningCLI builds the optimizer, and the strategy shards the model later."""
    for (message,) in run_ranks(sharded_after_the_optimizer, 2, names):
        assert "found no gradient on any of its 4 parameters" in message
        assert "sharded parameters (DTensors) in their place" in message
        assert "LargeBatch" in message
