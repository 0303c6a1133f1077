"""Ranks that mean different layers, at once or after some steps; and changes that all ranks make together.

Each ``attempt`` runs on every rank; what it raises there is the outcome. Every difference is on the last rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sharding.collectives import CountCollectives
from sharding.scenarios import EXACT, like, rank, reference_of, sharded, whole, world_mesh
from tolerances import relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_lamb import Lamb
from lightning_lamb.errors import LightningLambError
from lightning_lamb.optimizers import ShardedStateOptimizer

SHAPES = {"first": (6, 5), "second": (6, 5), "third": (4, 3)}


def collect() -> dict[str, tuple[str, str, bool]]:
    """Worker: name to (class of the error or "", its message, whether the weights are those before the step)."""
    found = {}
    for name, attempt in ATTEMPTS.items():
        torch.manual_seed(0)
        kind, message = "", ""
        before: list[Tensor] = []
        parameters: list[Any] = []
        try:
            for parameters in attempt():
                before = [local(parameter).clone() for parameter in parameters]
        except LightningLambError as error:
            kind, message = type(error).__name__, str(error)
        unmoved = all(torch.equal(local(p), old) for p, old in zip(parameters, before, strict=True))
        found[name] = (kind, message, unmoved)
        dist.barrier()
    return found


def odd() -> bool:
    """Whether this is the rank that differs."""
    return rank() == dist.get_world_size() - 1


def local(parameter: Any) -> Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def cut_layers(shapes: Any = None) -> dict[str, nn.Parameter]:
    return {name: sharded(torch.randn(shape), world_mesh()) for name, shape in (shapes or SHAPES).items()}


def whole_layers(shapes: Any = None) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in (shapes or SHAPES).items()}


def give(parameters: Any) -> None:
    for parameter in parameters:
        gradient = torch.randn(parameter.shape)
        parameter.grad = like(parameter, gradient) if hasattr(parameter, "to_local") else gradient


def stepped(parameters: Any, optimizer: Any, steps: int = 1) -> Any:
    """Yields before each of ``steps`` steps."""
    for _ in range(steps):
        give(parameters.values())
        yield list(parameters.values())
        optimizer.step()


# ---- at the first step


def fewer_layers() -> Any:
    parameters = cut_layers()
    named = list(parameters.items())[: 2 if odd() else 3]
    yield from stepped(parameters, Lamb(named))


def fewer_layers_of_sharded_state() -> Any:
    parameters = whole_layers()
    named = list(parameters.items())[: 2 if odd() else 3]
    yield from stepped(parameters, ShardedStateOptimizer(named))


def another_group() -> Any:
    parameters = cut_layers()
    decayed = ["first"] if odd() else ["first", "second"]
    groups = [
        {"params": [(n, p) for n, p in parameters.items() if n in decayed], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    yield from stepped(parameters, Lamb(groups))


def option(name: str, usual: Any, other: Any, kind: Callable[..., Any] = Lamb) -> Callable[[], Any]:
    def attempt() -> Any:
        parameters = cut_layers() if kind is Lamb else whole_layers()
        yield from stepped(parameters, kind(list(parameters.items()), **{name: other if odd() else usual}))

    return attempt


def unnamed_of_other_shapes() -> Any:
    parameters = cut_layers()
    order = list(parameters.values())
    yield from stepped(parameters, Lamb(order[::-1] if odd() else order))


def unnamed_weights_of_one_shape() -> Any:
    """Every rank has the whole weights: so layers without names are told apart by what is in them."""
    parameters = whole_layers({"first": (4, 4), "second": (4, 4)})
    order = list(parameters.values())
    yield from stepped(parameters, ShardedStateOptimizer(order[::-1] if odd() else order))


def names_on_some_ranks() -> Any:
    parameters = cut_layers()
    yield from stepped(parameters, Lamb(list(parameters.values()) if odd() else list(parameters.items())))


def frozen_on_one_rank() -> Any:
    parameters = cut_layers()
    parameters["second"].requires_grad_(not odd())
    optimizer = Lamb(list(parameters.items()))
    give(parameter for parameter in parameters.values() if parameter.requires_grad)
    yield list(parameters.values())
    optimizer.step()


# ---- later


def later(change: Callable[[Any, Any], None], kind: Callable[..., Any] = Lamb, **options: Any) -> Callable[[], Any]:
    """Three steps; before the third, one rank alone makes a change."""

    def attempt() -> Any:
        parameters = cut_layers() if kind is Lamb else whole_layers()
        optimizer = kind(list(parameters.items()), **options)
        yield from stepped(parameters, optimizer, 2)
        give(parameters.values())
        if odd():
            change(optimizer, parameters)
        yield list(parameters.values())
        optimizer.step()

    return attempt


def freeze(_: Any, parameters: Any) -> None:
    parameters["second"].requires_grad_(False)
    parameters["second"].grad = None


def add(optimizer: Any, _: Any) -> None:
    new = whole_layers({"new": (4, 4)}) if isinstance(optimizer, ShardedStateOptimizer) else cut_layers({"new": (4, 4)})
    optimizer.add_param_group({"params": list(new.items())})


def stop_adapting(optimizer: Any, _: Any) -> None:
    optimizer.param_groups[0]["adapt"] = False


def start_clipping(optimizer: Any, _: Any) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = 1.0


def clipped_by_hand() -> Any:
    """The norm is asked for first, as Lightning's clipping does."""
    parameters = cut_layers()
    optimizer = Lamb(list(parameters.items()))
    yield from stepped(parameters, optimizer, 2)
    if odd():
        freeze(optimizer, parameters)
    yield list(parameters.values())
    optimizer.global_grad_norm()


ATTEMPTS: dict[str, Callable[[], Any]] = {
    "fewer layers": fewer_layers,
    "fewer layers, ShardedStateOptimizer": fewer_layers_of_sharded_state,
    "another group": another_group,
    "weight_decay": option("weight_decay", 0.1, 0.0),
    "lr": option("lr", 0.1, 0.2),
    "adapt": option("adapt", True, False),
    "norm": option("norm", "l2", "linf"),
    "exempt_1d": option("exempt_1d", True, False),
    "max_grad_norm": option("max_grad_norm", 1.0, None),
    "weight_decay, ShardedStateOptimizer": option("weight_decay", 0.1, 0.0, ShardedStateOptimizer),
    "bucket_bytes": option("bucket_bytes", 100, 1000, ShardedStateOptimizer),
    "no names, other shapes": unnamed_of_other_shapes,
    "no names, ShardedStateOptimizer": unnamed_weights_of_one_shape,
    "names on some ranks": names_on_some_ranks,
    "frozen from the start": frozen_on_one_rank,
    "frozen later": later(freeze),
    "frozen later, clipped": later(freeze, max_grad_norm=1.0),
    "frozen later, linf": later(freeze, norm="linf"),
    "frozen later, ShardedStateOptimizer": later(freeze, ShardedStateOptimizer),
    "added later": later(add),
    "added later, clipped": later(add, max_grad_norm=1.0),
    "added later, ShardedStateOptimizer": later(add, ShardedStateOptimizer),
    "adapt later": later(stop_adapting),
    "max_grad_norm later": later(start_clipping),
    "frozen before the norm": clipped_by_hand,
}
"""Each is refused on every rank."""


# ---- changes that are none, or that all make


def together() -> dict[str, Any]:
    """Worker: all ranks freeze a layer, add another, and unfreeze; the reference is told the same."""
    torch.manual_seed(0)
    parameters = cut_layers({**SHAPES, "late": (5, 4)})
    reference = reference_of(parameters, max_grad_norm=1.0)
    optimizer = Lamb([(name, p) for name, p in parameters.items() if name != "late"], lr=0.05, max_grad_norm=1.0)
    collectives = []
    for step in range(8):
        parameters["second"].requires_grad_(step not in (2, 3))
        if step == 5:
            optimizer.add_param_group({"params": [("late", parameters["late"])]})
        grads: dict[str, Any] = {}
        for name, parameter in parameters.items():
            gradient = torch.randn(parameter.shape)
            present = parameter.requires_grad and (name != "late" or step >= 5)
            parameter.grad = like(parameter, gradient) if present else None
            grads[name] = gradient.double().numpy() if present else None
        with CountCollectives() as counted:
            optimizer.step()
        collectives.append(counted.total)
        reference.step(grads)
    errors = {name: relative_error(whole(p), reference.weights[name]) for name, p in parameters.items()}
    return {"errors": errors, "collectives": collectives, "exact": EXACT}


def rebuilt_on_one_rank() -> list[int]:
    """Worker: one rank loads its own state and rebuilds its plan, which changes nothing; collectives per step."""
    torch.manual_seed(0)
    parameters = cut_layers()
    optimizer = Lamb(list(parameters.items()), lr=0.05)
    found = []
    for step in range(4):
        if step == 2 and odd():
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give(parameters.values())
        with CountCollectives() as counted:
            optimizer.step()
        found.append(counted.total)
    return found


def unnamed_under_fsdp2() -> dict[str, float]:
    """Worker: `fully_shard` knows the names that nobody gave the optimizer; ratios in another order on one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.mul_(10.0**index)
    inputs = torch.randn(4, 8)
    alone = copy.deepcopy(model)
    expected = Lamb(alone.named_parameters(), lr=0.05)
    alone(inputs).square().mean().backward()
    expected.step()
    for layer in model:
        fully_shard(layer, mesh=world_mesh())
    fully_shard(model, mesh=world_mesh())
    order = list(model.parameters())
    optimizer = Lamb(order[::-1] if odd() else order, lr=0.05)
    model(inputs).square().mean().backward()
    optimizer.step()
    ratios = expected.trust_ratios
    return {name: abs(float(ratio) / float(ratios[name]) - 1) for name, ratio in optimizer.trust_ratios.items()}
