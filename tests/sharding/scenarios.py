"""Situations that a matrix does not reach, each a function that runs on every rank and asserts there.

``run_scenarios`` runs all that start with ``on_<ranks>_``; the tests in test_special_shards.py report them one by one.
"""

from __future__ import annotations

import traceback
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reference import ReferenceLamb
from sharding.collectives import CountCollectives
from tolerances import TOLERANCE, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_lamb import Lamb, Lars
from lightning_lamb.optimizers import ShardedStateOptimizer
from lightning_lamb.sharding import annotate

EXACT = TOLERANCE["sharded"].relative
LR = 0.05


def names(ranks: int) -> list[str]:
    return [name for name in globals() if name.startswith(f"on_{ranks}_")]


def run_scenarios(ranks: int) -> dict[str, str]:
    """Worker: name of the scenario to what went wrong on this rank, or ""."""
    found = {}
    for name in names(ranks):
        torch.manual_seed(0)
        try:
            globals()[name]()
            found[name] = ""
        except Exception:  # noqa: BLE001 - the test reports it
            found[name] = traceback.format_exc()
        dist.barrier()
    return found


def rank() -> int:
    return dist.get_rank()


def world_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("all",))


def draws(*shapes: tuple[int, ...], steps: int = 6, seed: int = 3) -> list[list[Tensor]]:
    """Per step, one gradient per shape; the same on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def sharded(tensor: Tensor, mesh: DeviceMesh, *placements: Any) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(tensor, mesh, list(placements) or [Shard(0)], src_data_rank=None))


def like(parameter: Tensor, grad: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(parameter: Tensor) -> np.ndarray:
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).double().numpy()


def assert_exact(parameters: dict[str, Tensor], reference: ReferenceLamb) -> None:
    for name, parameter in parameters.items():
        error = relative_error(whole(parameter), reference.weights[name])
        assert error <= EXACT, f"{name}: {error}"


def reference_of(parameters: dict[str, Tensor], **options: Any) -> ReferenceLamb:
    return ReferenceLamb({name: whole(p) for name, p in parameters.items()}, lr=LR, **options)


# ---- gradients that some ranks lack


def on_2_ranks_a_layer_without_gradient_on_one_rank_steps_there_with_zero() -> None:
    mesh = world_mesh()
    parameters = {"cut": sharded(torch.randn(5, 3), mesh), "other": sharded(torch.randn(4, 4), mesh)}
    reference = reference_of(parameters, max_grad_norm=1.0)
    optimizer = Lamb(list(parameters.items()), lr=LR, max_grad_norm=1.0)
    for step, (cut, other) in enumerate(draws((5, 3), (4, 4))):
        parameters["other"].grad = like(parameters["other"], other)
        parameters["cut"].grad = like(parameters["cut"], cut)
        seen = cut.clone()
        if step % 2:
            seen[3:] = 0  # rank 0 holds rows 0 to 2, and rank 1 has no gradient of the others
            if rank() == 1:
                parameters["cut"].grad = None
        optimizer.step()
        reference.step({"cut": seen.double().numpy(), "other": other.double().numpy()})
    assert_exact(parameters, reference)
    assert int(optimizer.state[parameters["cut"]]["step"]) == 6
    assert float(optimizer.trust_ratios["cut"]) > 0


def on_2_ranks_a_rank_without_any_gradient_takes_part() -> None:
    mesh = world_mesh()
    parameters = {"one": sharded(torch.randn(4, 3), mesh), "two": sharded(torch.randn(6, 2), mesh)}
    reference = reference_of(parameters)
    optimizer = Lamb(list(parameters.items()), lr=LR)
    for step, (one, two) in enumerate(draws((4, 3), (6, 2))):
        if rank() == 0:
            parameters["one"].grad, parameters["two"].grad = like(parameters["one"], one), like(parameters["two"], two)
        one[2:], two[3:] = 0, 0
        with CountCollectives() as counted:
            optimizer.step()
        assert counted.counts == {"allreduce_": 1 + (step == 0)}  # at first ranks compare their layers
        reference.step({"one": one.double().numpy(), "two": two.double().numpy()})
    assert_exact(parameters, reference)


def on_2_ranks_a_layer_without_gradient_anywhere_stays_and_is_not_counted() -> None:
    mesh = world_mesh()
    parameters = {"used": sharded(torch.randn(4, 3), mesh), "unused": sharded(torch.randn(6, 2), mesh)}
    before = whole(parameters["unused"])
    optimizer = Lamb(list(parameters.items()), lr=LR)
    for (used,) in draws((4, 3)):
        parameters["used"].grad = like(parameters["used"], used)
        optimizer.step()
    assert (whole(parameters["unused"]) == before).all()
    state = optimizer.state[parameters["unused"]]
    assert int(state["step"]) == 0
    assert not state["exp_avg"].to_local().any()
    assert "unused" not in optimizer.trust_ratios


def on_2_ranks_frozen_layers_cost_nothing() -> None:
    mesh = world_mesh()
    parameters = {"used": sharded(torch.randn(4, 3), mesh), "frozen": sharded(torch.randn(6, 2), mesh)}
    parameters["frozen"].requires_grad_(False)
    optimizer = Lamb(list(parameters.items()), lr=LR)
    parameters["used"].grad = like(parameters["used"], torch.randn(4, 3))
    optimizer.step()
    assert parameters["frozen"] not in optimizer.state or not optimizer.state[parameters["frozen"]]


# ---- shapes


def on_2_ranks_zero_element_and_scalar_parameters_beside_cut_layers() -> None:
    mesh = world_mesh()
    parameters = {
        "cut": sharded(torch.randn(5, 3), mesh),
        "nothing": sharded(torch.randn(0, 4), mesh),
        "row": sharded(torch.randn(1, 4), mesh),  # rank 1 has none of it
        "plain_nothing": nn.Parameter(torch.randn(0, 2)),
        "scalar": nn.Parameter(torch.tensor(2.0)),
    }
    reference = reference_of(parameters, exempt_1d=False, max_grad_norm=2.0)
    optimizer = Lamb(list(parameters.items()), lr=LR, exempt_1d=False, max_grad_norm=2.0)
    shapes = [tuple(parameter.shape) for parameter in parameters.values()]
    for grads in draws(*shapes):
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = like(parameter, grad) if isinstance(parameter, DTensor) else grad
        optimizer.step()
        reference.step({name: grad.double().numpy() for name, grad in zip(parameters, grads, strict=True)})
    assert_exact(parameters, reference)
    assert float(optimizer.trust_ratios["nothing"]) == 1.0


def on_4_ranks_a_mesh_without_names_is_reduced_axis_by_axis() -> None:
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2))
    parameters = {
        "both": sharded(torch.randn(6, 5), mesh, Shard(0), Shard(1)),
        "first": sharded(torch.randn(5, 3), mesh, Shard(0), Replicate()),
        "second": sharded(torch.randn(3, 7), mesh, Replicate(), Shard(1)),
        "copied": sharded(torch.randn(3, 3), mesh, Replicate(), Replicate()),
    }
    assert_mesh_is_exact(parameters, 4)  # two axes, for the norms and for the clip


def on_4_ranks_layers_cut_along_different_axes_of_one_mesh_share_an_all_reduce() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parameters = {
        "both": sharded(torch.randn(6, 5), mesh, Shard(0), Shard(1)),
        "first": sharded(torch.randn(5, 3), mesh, Shard(0), Replicate()),
        "second": sharded(torch.randn(3, 7), mesh, Replicate(), Shard(1)),
        "twice": sharded(torch.randn(7, 3), mesh, Shard(0), Shard(0)),
        "copied": sharded(torch.randn(3, 3), mesh, Replicate(), Replicate()),
    }
    assert_mesh_is_exact(parameters, 2)


def on_4_ranks_layers_on_a_part_of_the_mesh_travel_with_the_rest_when_clipping() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parameters = {
        "both": sharded(torch.randn(6, 5), mesh, Shard(0), Shard(1)),
        "data": sharded(torch.randn(5, 3), mesh["data"], Shard(0)),
        "tensor": sharded(torch.randn(5, 3), mesh["tensor"], Shard(1)),
    }
    assert_mesh_is_exact(parameters, 4)  # three process groups, and one to clip


def assert_mesh_is_exact(parameters: dict[str, Tensor], collectives: int) -> None:
    reference = reference_of(parameters, max_grad_norm=1.0)
    optimizer = Lamb(list(parameters.items()), lr=LR, max_grad_norm=1.0)
    for step, grads in enumerate(draws(*(tuple(parameter.shape) for parameter in parameters.values()))):
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = like(parameter, grad)
        with CountCollectives() as counted:
            optimizer.step()
        comparisons = 2 * (step == 0)  # of the layers, along each axis
        assert counted.counts == {"allreduce_": collectives + comparisons}, counted.counts
        reference.step({name: grad.double().numpy() for name, grad in zip(parameters, grads, strict=True)})
        assert abs(float(optimizer.grad_norm) / reference.grad_norm - 1) < EXACT
    assert_exact(parameters, reference)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: float(ratio) for name, ratio in optimizer.trust_ratios.items()})
    assert all(other == everyone[0] for other in everyone), everyone


# ---- groups, precision


def on_2_ranks_groups_with_options_of_their_own_share_the_all_reduce() -> None:
    mesh = world_mesh()
    parameters = {name: sharded(torch.randn(5, 4), mesh) for name in ("decayed", "plain", "largest", "unadapted")}
    own = {"plain": {"weight_decay": 0.0, "lr": 0.01}, "largest": {"norm": "linf"}, "unadapted": {"adapt": False}}
    reference = reference_of(parameters, per_layer=own)
    groups = [{"params": [(name, p)], **own.get(name, {})} for name, p in parameters.items()]
    optimizer = Lamb(groups, lr=LR)
    for step, grads in enumerate(draws(*[(5, 4)] * 4)):
        for parameter, grad in zip(parameters.values(), grads, strict=True):
            parameter.grad = like(parameter, grad)
        with CountCollectives() as counted:
            optimizer.step()
        assert counted.counts == {"allreduce_": 2 + (step == 0)}  # sums and maxima do not mix
        reference.step({name: grad.double().numpy() for name, grad in zip(parameters, grads, strict=True)})
    assert_exact(parameters, reference)


def on_2_ranks_parameters_added_later_join() -> None:
    mesh = world_mesh()
    parameters = {"old": sharded(torch.randn(5, 4), mesh), "new": sharded(torch.randn(3, 4), mesh)}
    reference = reference_of(parameters)
    optimizer = Lamb([("old", parameters["old"])], lr=LR)
    for step, (old, new) in enumerate(draws((5, 4), (3, 4))):
        if step == 2:
            optimizer.add_param_group({"params": [("new", parameters["new"])]})
        parameters["old"].grad, parameters["new"].grad = like(parameters["old"], old), like(parameters["new"], new)
        optimizer.step()
        reference.step({"old": old.double().numpy(), "new": None if step < 2 else new.double().numpy()})
    assert_exact(parameters, reference)


def on_2_ranks_gradients_are_left_alone() -> None:
    """Clipped, completed from partial sums, bounded: ``p.grad`` is the caller's."""
    from torch.distributed.tensor import Partial

    mesh = world_mesh()
    parameters = {"cut": sharded(torch.randn(5, 4), mesh), "copied": sharded(torch.randn(3, 4), mesh, Replicate())}
    reference = reference_of(parameters, max_grad_norm=0.1)
    optimizer = Lamb(list(parameters.items()), lr=LR, max_grad_norm=0.1)
    for step, (cut, copied) in enumerate(draws((5, 4), (3, 4))):
        part = copied * (0.25 if rank() == 0 else 0.75)
        parameters["cut"].grad = like(parameters["cut"], cut)
        parameters["copied"].grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        before = [p.grad.to_local().clone() for p in parameters.values()]
        with CountCollectives() as counted:
            optimizer.step()
        assert counted.counts == {"allreduce_": 3 + (step == 0)}  # partial sums, clip, norms
        assert all(torch.equal(p.grad.to_local(), old) for p, old in zip(parameters.values(), before, strict=True))
        assert parameters["copied"].grad.placements[0].is_partial()
        reference.step({"cut": cut.double().numpy(), "copied": copied.double().numpy()})
    assert_exact(parameters, reference)


def half_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 17), nn.Linear(17, 5)).bfloat16()


def train_half(model: nn.Module, parameters: list[nn.Parameter], optimizer: Any, steps: int = 12) -> list[Any]:
    """Trains on the same data everywhere; returns what the ranks saw as gradients, local parts."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 9, generator=generator).bfloat16()
        model(inputs).float().square().mean().backward()
        optimizer.step()
    return [optimizer.state[p]["master_weight"] for p in parameters]


def masters_alone(steps: int = 12) -> dict[str, Tensor]:
    net = half_net()
    optimizer = Lamb(net.named_parameters(), lr=1e-3)
    masters = train_half(net, list(net.parameters()), optimizer, steps)
    return {name: master.clone() for (name, _), master in zip(net.named_parameters(), masters, strict=True)}


def on_2_ranks_bf16_true_keeps_float32_masters_under_fsdp2() -> None:
    """lr 1e-3 is below half an ulp of bf16: without masters three quarters of the elements never move."""
    net = half_net()
    for layer in net:
        fully_shard(layer, mesh=world_mesh())
    fully_shard(net, mesh=world_mesh())
    optimizer = Lamb(net.named_parameters(), lr=1e-3)
    masters = train_half(net, list(net.parameters()), optimizer)
    for (name, expected), master in zip(masters_alone().items(), masters, strict=True):
        assert isinstance(master, DTensor)
        assert master.dtype == torch.float32
        assert relative_error(master.full_tensor(), expected) < 2e-5, name  # bf16 gradients, averaged over two ranks
    for parameter, master in zip(net.parameters(), masters, strict=True):
        assert torch.equal(parameter.to_local(), master.to_local().bfloat16())


def on_2_ranks_bf16_true_keeps_float32_masters_under_fsdp1() -> None:
    net = half_net()
    model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    annotate(model)
    optimizer = Lamb(net.named_parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=generator).bfloat16()).float().square().mean().backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        for (name, parameter), expected in zip(net.named_parameters(), masters_alone().values(), strict=True):
            assert relative_error(parameter, expected) <= 2**-8, name


def on_2_ranks_bf16_true_keeps_float32_masters_with_sharded_state() -> None:
    net = half_net()
    optimizer = ShardedStateOptimizer(net.named_parameters(), Lamb, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        optimizer.zero_grad()
        net(torch.randn(8, 9, generator=generator).bfloat16()).float().square().mean().backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=1)
    alone = masters_alone()
    if rank() == 1:
        saved = optimizer.state_dict()["state"]
        for index, (name, expected) in enumerate(alone.items()):
            assert saved[index]["master_weight"].dtype == torch.float32
            assert relative_error(saved[index]["master_weight"], expected) <= EXACT, name


def on_2_ranks_lars_and_lamb_refuse_to_differentiate_through_an_all_reduce() -> None:
    from lightning_lamb.errors import InvalidOptionError

    parameter = sharded(torch.randn(4, 3), world_mesh())
    parameter.grad = like(parameter, torch.randn(4, 3))
    for kind in (Lamb, Lars):
        optimizer = kind([("cut", parameter)], lr=LR, differentiable=True)
        try:
            optimizer.step()
        except InvalidOptionError as error:
            assert "cut" in str(error)
        else:
            raise AssertionError("not refused")
