"""Layouts that the optimizer cannot see through: each function builds one and steps; the test looks at the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_lamb import Lamb
from lightning_lamb.errors import LightningLambError
from lightning_lamb.optimizers import ShardedStateOptimizer
from lightning_lamb.sharding import annotate


def collect(ranks: int) -> dict[str, tuple[str, str, bool]]:
    """Worker: name to (class, message, whether all weights stayed as they were)."""
    found = {}
    for name, attempt in REFUSED.items():
        torch.manual_seed(0)
        optimizer: Any = None
        before: list[torch.Tensor] = []
        try:
            for optimizer in attempt():
                before = [local(p).clone() for group in optimizer.param_groups for p in group["params"]]
            found[name] = ("nothing", "it stepped", False)
        except LightningLambError as error:
            after = [] if optimizer is None else [local(p) for group in optimizer.param_groups for p in group["params"]]
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            found[name] = (type(error).__name__, str(error), same)
        dist.barrier()
    return found


def local(parameter: Any) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def mesh() -> Any:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("all",))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def stepped(model: nn.Module, optimizer: Any) -> Any:
    """Yields the optimizer before each of two steps."""
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        yield optimizer
        optimizer.step()


def fsdp1(module: nn.Module, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **{"use_orig_params": True, **options})


def unannotated() -> Any:
    model = fsdp1(net())
    yield from stepped(model, Lamb(model.named_parameters()))


def merged() -> Any:
    model = fsdp1(net(), use_orig_params=False)
    yield from stepped(model, Lamb(model.named_parameters()))


def merged_and_annotated() -> Any:
    annotate(fsdp1(net(), use_orig_params=False))
    yield Lamb(net().parameters())


def partial_parameter() -> Any:
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3, 3), mesh(), [Partial()], run_check=False))
    parameter.grad = DTensor.from_local(torch.ones(3, 3), mesh(), [Partial()], run_check=False)
    optimizer = Lamb([("half", parameter)])
    yield optimizer
    optimizer.step()


def plain_gradient() -> Any:
    parameter = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh(), [Shard(0)]))
    optimizer = Lamb([("cut", parameter)])
    with Plain(parameter):
        yield optimizer
        optimizer.step()


class Plain:
    """Makes ``parameter.grad`` a plain tensor, as an extension might; torch itself refuses to store one."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    def __enter__(self) -> None:
        parameter = self.parameter
        DTensor.grad = property(lambda tensor: torch.ones(2, 3) if tensor is parameter else None)  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        del DTensor.grad


def stale() -> Any:
    """The stock LightningCLI's order: first the optimizer, then the sharding, which replaces the parameters."""
    model = net()
    optimizer = Lamb(model.named_parameters())
    fully_shard(model, mesh=mesh())
    yield from stepped(model, optimizer)


def fsdp1_over_tensor_parallel() -> Any:
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = net()
    parallelize_module(model, grid["tensor"], {"0": ColwiseParallel(output_layouts=Replicate())})
    annotate(fsdp1(model, device_mesh=grid["data"]))
    yield Lamb(net().parameters())


def state_sharded_twice_fsdp1() -> Any:
    model = fsdp1(net())
    annotate(model)
    yield from stepped(model, ShardedStateOptimizer(model.named_parameters()))


def state_sharded_twice_fsdp2() -> Any:
    model = fully_shard(net(), mesh=mesh())
    yield from stepped(model, ShardedStateOptimizer(model.named_parameters()))


def clip_in_zero_redundancy_optimizer() -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    yield from stepped(model, ZeroRedundancyOptimizer(model.parameters(), Lamb, max_grad_norm=1.0))


def state_not_consolidated() -> Any:
    model = net()
    optimizer = ShardedStateOptimizer(model.named_parameters())
    optimizer.state_dict()
    yield optimizer


REFUSED: dict[str, Callable[[], Any]] = {
    "FSDP1 that nobody annotated": unannotated,
    "FSDP1 with use_orig_params=False": merged,
    "annotating FSDP1 with use_orig_params=False": merged_and_annotated,
    "a partial DTensor": partial_parameter,
    "a plain gradient on a DTensor": plain_gradient,
    "parameters that were replaced after the optimizer was built": stale,
    "FSDP1 over tensor parallel": fsdp1_over_tensor_parallel,
    "state sharded twice, FSDP1": state_sharded_twice_fsdp1,
    "state sharded twice, FSDP2": state_sharded_twice_fsdp2,
    "a clip norm inside torch's ZeroRedundancyOptimizer": clip_in_zero_redundancy_optimizer,
    "the state dict of one rank": state_not_consolidated,
}
