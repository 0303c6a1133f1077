"""How far a sharded training drifts from the same training on one process, for ours and other packages' LAMBs.

    python examples/figures/sharded_error.py

Every optimizer at its own defaults, but the learning rate, trains the same small network on the same batches: once on
one process, then cut over gloo ranks by FSDP1 (``use_orig_params=True``, Lightning's default) and by FSDP2. All ranks
see the same data, so the gradients agree and whatever differs is the optimizer. Writes docs/figures/sharded_error.png
and .json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import contenders

ROOT = Path(__file__).resolve().parents[2]
LR = 0.01


def ours(params: Any) -> torch.optim.Optimizer:
    """Our Lamb."""
    from lightning_lamb import Lamb

    return Lamb(params, lr=LR)


def peer(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Another package's Lamb at its defaults."""
    classes: dict[str, Callable[[], Any]] = {
        "timm": contenders.timm_lamb_class,
        "torch_optimizer": lambda: importlib.import_module("torch_optimizer").Lamb,
        "pytorch_optimizer": lambda: importlib.import_module("pytorch_optimizer").Lamb,
    }
    return lambda params: classes[name]()(params, lr=LR)


OPTIMIZERS = {"lightning_lamb": ours} | {name: peer(name) for name in ("timm", "torch_optimizer", "pytorch_optimizer")}


def network() -> nn.Sequential:
    """Three blocks of layers whose sizes no number of ranks divides well."""
    torch.manual_seed(0)
    sizes = [33, 65, 65, 9]
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.Tanh()) for a, b in itertools.pairwise(sizes))
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, weights: Callable[[], list[Tensor]]) -> list:
    """Trains, and returns the weights after every step."""
    data = torch.Generator().manual_seed(1)
    history = []
    for _ in range(steps):
        inputs, targets = torch.randn(32, 33, generator=data), torch.randn(32, 9, generator=data)
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
        history.append([weight.detach().clone() for weight in weights()])
    return history


def train_alone(name: str, steps: int) -> list[list[Tensor]]:
    """On one process, nothing cut."""
    model = network()
    return train(model, OPTIMIZERS[name](list(model.parameters())), steps, lambda: list(model.parameters()))


def train_sharded(layout: str, name: str, steps: int) -> list[list[Tensor]]:
    """Cut over the ranks of the default group; every rank returns whole weights."""
    from lightning_lamb.sharding import annotate

    model: nn.Module = network()
    if layout == "FSDP2":
        for block in model:
            fully_shard(block)
        fully_shard(model)
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        return train(model, optimizer, steps, lambda: [p.full_tensor() for p in model.parameters()])
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    annotate(model)

    def whole() -> list[Tensor]:
        with FullyShardedDataParallel.summon_full_params(model):
            return [parameter.detach().clone() for parameter in model.parameters()]

    return train(model, OPTIMIZERS[name](list(model.parameters())), steps, whole)


def errors(history: list[list[Tensor]], reference: list[list[Tensor]]) -> list[float]:
    """Per step, the largest of the layers' relative differences."""
    return [
        max(((a - b).norm() / b.norm()).item() for a, b in zip(now, then) if b.ndim > 1)
        for now, then in zip(history, reference)
    ]


def rank_main(rank: int, ranks: int, rendezvous: str, layout: str, name: str, steps: int, output: str) -> None:
    """One rank of one training."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    result: dict[str, Any]
    try:
        result = {"errors": errors(train_sharded(layout, name, steps), train_alone(name, steps))}
    except Exception as error:  # noqa: BLE001  that a peer fails is a result
        result = {"fails": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    if rank == 0:
        Path(output).write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)  # a failed rank must not wait for the others


def measure(layouts: list[str], optimizers: list[str], ranks: int, steps: int) -> dict[str, Any]:
    """``{layout: {optimizer: {"errors": [...]} or {"fails": why}}}``."""
    results: dict[str, Any] = {}
    for layout in layouts:
        for name in optimizers:
            with tempfile.TemporaryDirectory() as folder:
                output = f"{folder}/result.json"
                arguments = (ranks, f"{folder}/rendezvous", layout, name, steps, output)
                mp.spawn(rank_main, arguments, nprocs=ranks)
                results.setdefault(layout, {})[name] = json.loads(Path(output).read_text(encoding="utf-8"))
            print(layout, name, _summary(results[layout][name]), flush=True)
    return results


def _summary(result: dict[str, Any]) -> str:
    return result.get("fails") or f"{result['errors'][-1]:.1e} after {len(result['errors'])} steps"


def draw(results: dict[str, Any], ranks: int, path: Path) -> None:
    """One panel per layout, error over steps on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, (layout, by_optimizer) in zip(axes, results.items()):
        for index, (name, result) in enumerate(by_optimizer.items()):
            color = f"C{index}"
            if "errors" in result:
                # An error of exactly 0 has no logarithm: drawn at the bottom.
                steps = range(1, len(result["errors"]) + 1)
                axis.semilogy(
                    steps, [max(e, 1e-9) for e in result["errors"]], color, label=name, lw=2 if index == 0 else 1.3
                )
            else:
                axis.plot([], [], color, label=f"{name} (fails)", ls=":")
        axis.set(title=f"{layout}, {ranks} ranks", xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("relative error of the worst layer")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layouts", nargs="+", default=["FSDP1", "FSDP2"], choices=["FSDP1", "FSDP2"])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    results = measure(args.layouts, args.optimizers, args.ranks, args.steps)
    packages = {"lightning_lamb": "lightning-lamb", "timm": "timm", "torch": "torch"}
    packages |= {name: name for name in ("torch_optimizer", "pytorch_optimizer")}
    versions = {name: importlib.metadata.version(package) for name, package in packages.items()}
    record = {"ranks": args.ranks, "lr": LR, "versions": versions, "results": results}
    (args.output / "sharded_error.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(results, args.ranks, args.output / "sharded_error.png")


if __name__ == "__main__":
    main()
