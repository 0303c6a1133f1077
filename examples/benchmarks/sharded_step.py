"""Time and memory of one optimizer step on several ranks: our Lamb whole and sharded, and timm's under FSDP2.

    python examples/benchmarks/sharded_step.py --shapes bert-base "200*64x64" --ranks 2 4

Every rank is a process on this machine with one thread, connected by gloo. A round times each contender once, in an
order shuffled anew and the same on all ranks; a time is that of the slowest rank. Contenders are compared within a
round. What the all-reduce of a step costs is measured by itself, with as many numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import machine
import shapes
from contenders import SETTINGS, timm_lamb_class
from lightning_lamb import Lamb
from lightning_lamb.optimizers import ShardedStateOptimizer
from sharded_report import ALONE, OURS, TIMM, WHOLE, ZERO, page, section


class Layers(nn.Module):
    """Parameters of given shapes, the same on every rank."""

    def __init__(self, model_shapes: Sequence[shapes.Shape]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ParameterList(torch.randn(shape) * 0.02 for shape in model_shapes)


def with_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gives every parameter a gradient laid out like it."""
    for parameter in parameters:
        grad = torch.randn(parameter.shape) * 1e-3
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = grad
    return list(parameters)


def all_reduces_of(action: Callable[[], Any]) -> list[Tensor]:
    """Copies of what an action sends through all-reduces."""
    sent: list[Tensor] = []
    real = dist.all_reduce

    def recording(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.clone())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = recording
    try:
        action()
    finally:
        dist.all_reduce = real
    return sent


def build(model_shapes: Sequence[shapes.Shape]) -> dict[str, Any]:
    """The optimizers; the whole ones share weights, and the sharded ones."""
    ours = {**SETTINGS, "exempt_1d": False}  # timm gives 1-D tensors a ratio too
    whole = with_gradients(list(Layers(model_shapes).parameters()))
    model = Layers(model_shapes)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    sharded = with_gradients(list(model.parameters()))
    return {
        WHOLE: Lamb(whole, **ours),
        ZERO: ShardedStateOptimizer(whole, Lamb, **ours),
        OURS: Lamb(sharded, **ours),
        TIMM: timm_lamb_class()(sharded, max_grad_norm=None, **SETTINGS),
    }


def seconds_of(action: Callable[[], Any], repeats: int) -> float:
    """Mean seconds of an action on the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    taken = torch.tensor((time.perf_counter() - start) / repeats, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def state_bytes(optimizer: Any) -> int:
    """What this rank holds beside weights and gradients."""
    held = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in held]
    return sum(value.numel() * value.element_size() for value in local)


def measure(rank: int, ranks: int, store: str, text: str, rounds: int, results: str) -> None:
    """Body of one rank; rank zero writes what all measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    model_shapes = shapes.parse(text)
    optimizers = build(model_shapes)

    optimizers[OURS].step()
    sent = all_reduces_of(optimizers[OURS].step)

    def communicate() -> None:
        for tensor in sent:
            dist.all_reduce(tensor)

    actions = {name: optimizer.step for name, optimizer in optimizers.items()} | {ALONE: communicate}
    repeats = {}
    for name, action in actions.items():
        action()  # allocates
        once = seconds_of(action, 1)
        repeats[name] = max(1, min(20, int(0.05 / once)))
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name in order.sample(list(actions), len(actions)):
            seconds[name].append(seconds_of(actions[name], repeats[name]))
    memory = {name: state_bytes(optimizer) for name, optimizer in optimizers.items()}
    if rank == 0:
        elements = sum(parameter.numel() for group in optimizers[WHOLE].param_groups for parameter in group["params"])
        entry = {"shapes": text, "ranks": ranks, "parameters": elements, "tensors": len(model_shapes)}
        Path(results).write_text(json.dumps({**entry, "seconds": seconds, "state_bytes": memory}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and middle halves, and ratios within rounds."""
    seconds = measured.pop("seconds")

    def quartiles(values: Sequence[float]) -> dict[str, float]:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return {"median": middle, "q1": low, "q3": high}

    measured["seconds"] = {name: quartiles(values) for name, values in seconds.items()}
    measured["times_ours"] = {
        name: quartiles([mine / ours for mine, ours in zip(values, seconds[OURS])]) for name, values in seconds.items()
    }
    return measured


def main() -> None:
    """Runs everything that was asked for and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["bert-base", "200*64x64"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15, help="measurements per contender; at least 2")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--markdown", type=Path, help="where to write the page")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    results: dict[str, Any] = {
        "command": shlex.join(["python", "examples/benchmarks/sharded_step.py", *sys.argv[1:]]),
        "machine": machine.describe("cpu"),
        "rounds": args.rounds,
        "models": [],
    }
    for text in args.shapes:
        for ranks in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                measured = Path(folder, "measured.json")
                arguments = (ranks, str(Path(folder, "store")), text, args.rounds, str(measured))
                processes.spawn(measure, arguments, nprocs=ranks)
                results["models"].append(summary(json.loads(measured.read_text(encoding="utf-8"))))
            print(section(results["models"][-1]), flush=True)
    results["machine"]["load_average_at_end"] = machine.describe("cpu")["load_average"]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
