"""Every way to lay a network out over ranks, behind one interface.

A layout is asked which elements of each layer are here by wrapping a twin whose elements are their own numbers: no
knowledge of how a wrapper cuts goes into these tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sharding.networks import Net, new_net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from lightning_lamb.sharding import annotate, clean_name


@dataclass(frozen=True)
class Layout:
    """One way to lay a network out.

    Attributes:
        name: for test ids and for the table in the docs.
        ranks: number of processes.
        wrap: shards or wraps the network; returns what is called in the forward pass.
        width: of the network.
        data_ranks: ranks that see different samples.
        groups: process groups that hold pieces of layers, hence all-reduces per step.
        compared: process groups over which the layers are compared, once.
        partial: whether some gradients are partial sums over ranks: one more all-reduce for all of them.
        zero: "ours" or "torch": who shards the optimizer state.
    """

    name: str
    ranks: int
    wrap: Callable[[Net], nn.Module]
    width: int = 17
    data_ranks: int = 1
    groups: int = 0
    compared: int = 0
    partial: bool = False
    zero: str = ""


@functools.cache
def mesh(*sizes: int) -> Any:
    """One mesh of each shape per process, its axes named as in Lightning."""
    names = {1: ("data_parallel",), 2: ("data_parallel", "tensor_parallel")}[len(sizes)]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@functools.cache
def hybrid_mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def ddp(net: Net) -> nn.Module:
    return DistributedDataParallel(net)


def fsdp1(strategy: ShardingStrategy, net: Net) -> nn.Module:
    hybrid = strategy is ShardingStrategy.HYBRID_SHARD
    return FullyShardedDataParallel(
        net,
        sharding_strategy=strategy,
        auto_wrap_policy=ModuleWrapPolicy({nn.LayerNorm}),  # `wide` and `tied` share a weight: one unit
        use_orig_params=True,
        device_id=torch.device("cpu"),
        device_mesh=hybrid_mesh() if hybrid else None,
    )


def fsdp2(ranks: int, net: Net) -> nn.Module:
    fully_shard(net.narrow, mesh=mesh(ranks))
    return fully_shard(net, mesh=mesh(ranks))


def hsdp(net: Net) -> nn.Module:
    fully_shard(net.narrow, mesh=hybrid_mesh())
    return fully_shard(net, mesh=hybrid_mesh())


def tensor_parallel(tensor_mesh: Any, net: Net) -> nn.Module:
    """Column-wise, row-wise, sequence-parallel (whose gradients are partial sums), and layers that stay plain."""
    parallelize_module(
        net,
        tensor_mesh,
        {
            "first": ColwiseParallel(output_layouts=Shard(0)),
            "norm.0": SequenceParallel(sequence_dim=0),
            "norm": PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
            "zero": ColwiseParallel(output_layouts=Replicate()),
            "frozen": ColwiseParallel(output_layouts=Replicate()),
            "narrow": RowwiseParallel(input_layouts=Replicate()),
        },
    )
    return net


def tp(ranks: int, net: Net) -> nn.Module:
    return tensor_parallel(mesh(1, ranks)["tensor_parallel"], net)


def fsdp2_tp(net: Net) -> nn.Module:
    tensor_parallel(mesh(2, 2)["tensor_parallel"], net)
    fully_shard(net.narrow, mesh=mesh(2, 2)["data_parallel"])
    return fully_shard(net, mesh=mesh(2, 2)["data_parallel"])


def _fsdp1(name: str, ranks: int, strategy: ShardingStrategy) -> Layout:
    groups = 0 if strategy is ShardingStrategy.NO_SHARD else 1
    return Layout(name, ranks, functools.partial(fsdp1, strategy), data_ranks=ranks, groups=groups, compared=groups)


LAYOUTS = [
    Layout("DDP", 2, ddp, data_ranks=2),
    Layout("DDP", 4, ddp, data_ranks=4),
    Layout("DDP, ShardedStateOptimizer (ZeRO-1)", 2, ddp, data_ranks=2, groups=1, compared=1, zero="ours"),
    Layout("DDP, ShardedStateOptimizer (ZeRO-1)", 4, ddp, data_ranks=4, groups=1, compared=1, zero="ours"),
    Layout("DDP, torch ZeroRedundancyOptimizer", 2, ddp, data_ranks=2, zero="torch"),
    _fsdp1("FSDP1 FULL_SHARD", 2, ShardingStrategy.FULL_SHARD),
    _fsdp1("FSDP1 FULL_SHARD", 4, ShardingStrategy.FULL_SHARD),
    _fsdp1("FSDP1 SHARD_GRAD_OP", 2, ShardingStrategy.SHARD_GRAD_OP),
    _fsdp1("FSDP1 NO_SHARD", 2, ShardingStrategy.NO_SHARD),
    _fsdp1("FSDP1 HYBRID_SHARD", 4, ShardingStrategy.HYBRID_SHARD),
    Layout("FSDP2", 2, functools.partial(fsdp2, 2), data_ranks=2, groups=1, compared=1),
    Layout("FSDP2", 4, functools.partial(fsdp2, 4), data_ranks=4, groups=1, compared=1),
    Layout("HSDP (FSDP2 on a 2-D mesh)", 4, hsdp, data_ranks=4, groups=1, compared=2),
    Layout("tensor parallel", 2, functools.partial(tp, 2), width=18, groups=1, compared=1, partial=True),
    Layout("tensor parallel", 4, functools.partial(tp, 4), width=20, groups=1, compared=1, partial=True),
    Layout("FSDP2 with tensor parallel", 4, fsdp2_tp, width=20, data_ranks=2, groups=2, compared=2),
]


# ---- which elements are here


def local_part(tensor: Tensor) -> Tensor:
    """The elements on this rank, whatever holds them."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_weights(net: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's elements by layer name."""
    return {clean_name(name): local_part(p).clone() for name, p in net.named_parameters()}


class Laid:
    """A network in its layout, and where each of its elements is.

    Args:
        layout: how.
        dtype: of the parameters.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
        self.layout = layout
        twin = new_net(layout.width)
        self.shapes = {name: p.shape for name, p in twin.named_parameters()}
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
        layout.wrap(twin)
        self.places = {name: part.long() for name, part in local_weights(twin).items()}
        self.size = sum(place.numel() for place in self.places.values())
        self.everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self.everyone, {name: place.flatten() for name, place in self.places.items()})
        self.widest = max(sum(place.numel() for place in places.values()) for places in self.everyone)
        self.net = new_net(layout.width).to(dtype)
        self.model = layout.wrap(self.net)
        annotate(self.model)
        annotate(self.net)
        self.parameters = {clean_name(name): p for name, p in self.net.named_parameters()}

    def data_rank(self) -> int:
        """Which part of the global batch this rank sees: tensor-parallel ranks are next to each other."""
        return dist.get_rank() // (self.layout.ranks // self.layout.data_ranks)

    def set_gradients(self, full: dict[str, Tensor | None]) -> None:
        """Gives every parameter its part of a whole gradient, as its layout would hold it."""
        for name, parameter in self.parameters.items():
            whole = full.get(name)
            if whole is None:
                parameter.grad = None
                continue
            part = whole.flatten()[self.places[name].flatten()].view(self.places[name].shape)
            parameter.grad = like_parameter(parameter, part.to(parameter.dtype))

    def assembled(self, parts: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Whole layers from the parts of all ranks, in one collective; None for a layer of which no rank has a part.

        Raises:
            AssertionError: two ranks hold different values of one element, or no rank holds one.
        """
        vector = torch.full((self.widest,), float("nan"), dtype=torch.float64)
        own = vector.split([*(place.numel() for place in self.places.values()), self.widest - self.size])
        for name, room in zip(self.places, own, strict=False):
            if name in parts:
                room.copy_(parts[name].detach().flatten())
        vectors = [torch.empty_like(vector) for _ in self.everyone]
        dist.all_gather(vectors, vector)
        whole = {
            name: torch.full((shape.numel(),), float("nan"), dtype=torch.float64) for name, shape in self.shapes.items()
        }
        for places, values in zip(self.everyone, vectors, strict=True):
            position = 0
            for name, place in places.items():
                new = values[position : position + place.numel()]
                position += place.numel()
                known = whole[name][place]
                assert bool((known.isnan() | new.isnan() | (known == new)).all()), f"{name}: ranks disagree"
                whole[name][place] = torch.where(new.isnan(), known, new)
        absent = {name for name, values in whole.items() if values.numel() and values.isnan().all()}
        broken = [name for name, values in whole.items() if name not in absent and values.isnan().any()]
        assert not broken, f"elements that no rank holds, or NaN: {broken}"
        return {name: None if name in absent else values.view(self.shapes[name]) for name, values in whole.items()}

    def weights(self) -> dict[str, Tensor]:
        """Whole weights in float64."""
        whole = self.assembled(local_weights(self.net))
        return {name: values for name, values in whole.items() if values is not None}

    def gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients in float64; None where no rank has one."""
        return self.assembled({name: local_part(p.grad) for name, p in self.parameters.items() if p.grad is not None})


def like_parameter(parameter: Tensor, part: Tensor) -> Tensor:
    """This rank's part of a gradient as its parameter's kind of tensor."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
