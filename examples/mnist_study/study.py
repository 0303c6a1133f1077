"""LAMB against Adam and "AdamW" on MNIST by the protocol of ymcui/LAMB_Optimizer_TF: every seed and setting.

    python examples/mnist_study/study.py --data /path/to/mnist          # what docs/mnist_study.md shows
    python examples/mnist_study/study.py --data /path/to/mnist --batches 256 --models CNN --seeds 0 1 --device cuda

Each run takes 100 "epochs", 100 to 280 CPU seconds for the MLP. Finished runs are written to docs/mnist_study.json at
once and not repeated. ``--report`` prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from mnist_networks import NETWORKS, Init, network
from mnist_protocol import BATCHES, EPOCHS, LR, OPTIMIZERS, batches, load, optimizer_named, steps_per_epoch
from mnist_tables import tables

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import machine

ROOT = Path(__file__).resolve().parents[2]
CURVE_EPOCHS = (1, 5, *range(10, EPOCHS + 1, 10))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        model: a key of NETWORKS.
        batch: samples per step.
        optimizer: one of OPTIMIZERS.
        init: "normal" is the protocol's, "fan_in" torch's own.
        lr: constant learning rate; 0.001 is the protocol's.
        seed: of the initial weights and of the order of the images.
    """

    model: str
    batch: int
    optimizer: str
    init: Init = "normal"
    lr: float = LR
    seed: int = 0


def protocol_runs(models: list[str], sizes: list[int], seeds: list[int]) -> Iterator[Run]:
    """The published cells, cheapest batches first."""
    for model in models:
        for batch in sorted(sizes, reverse=True):
            for optimizer in OPTIMIZERS:
                for seed in seeds:
                    yield Run(model, batch, optimizer, seed=seed)


def control_runs(sizes: list[int], seeds: list[int]) -> Iterator[Run]:
    """What the published table leaves out: the same MLP with scaled initial weights, and other learning rates."""
    for batch in sorted(sizes, reverse=True):
        for seed in seeds:
            for optimizer in OPTIMIZERS:
                yield Run("MLP", batch, optimizer, init="fan_in", seed=seed)
            yield Run("MLP", batch, "Adam", lr=10 * LR, seed=seed)
            yield Run("MLP", batch, "LAMB", init="fan_in", lr=10 * LR, seed=seed)


def train(run: Run, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Trains one cell.

    Args:
        run: the setting.
        data: training images and labels, test images and labels; their device is used.

    Returns:
        The setting, its accuracy in percent after the last epoch, accuracies on the way, steps and CPU seconds.
    """
    images, labels, test_images, test_labels = data
    model = network(run.model, run.init, run.seed).to(images.device)
    optimizer = optimizer_named(run.optimizer, model.named_parameters(), run.lr)
    per_epoch = steps_per_epoch(run.batch)
    started, curve = time.process_time(), {}
    stream = batches(images, labels, run.batch, EPOCHS * per_epoch, run.seed)
    for step, (inputs, targets) in enumerate(stream, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        epoch, rest = divmod(step, per_epoch)
        if rest == 0 and epoch in CURVE_EPOCHS:
            curve[epoch] = accuracy(model, test_images, test_labels)
    return dataclasses.asdict(run) | {
        "accuracy": curve[EPOCHS],
        "curve": curve,
        "steps": EPOCHS * per_epoch,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that are classified rightly."""
    parts = zip(images.split(2000), labels.split(2000))
    right = sum(int((model(inputs).argmax(1) == targets).sum()) for inputs, targets in parts)
    return round(100.0 * right / len(labels), 2)


def identity(run: dict[str, Any]) -> Run:
    """The setting of a finished run."""
    return Run(**{field.name: run[field.name] for field in dataclasses.fields(Run)})


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("LIGHTNING_LAMB_DATA"), help="directory of MNIST's idx files")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=["MLP"])
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=[64, 1024, 16384])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--controls", nargs="*", type=int, default=[], help="batches to run the controls at")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "mnist_study.json")
    parser.add_argument("--report", action="store_true", help="print the tables of --output and train nothing")
    return parser.parse_args()


def main() -> None:
    """Runs what is not in the output yet."""
    options = parse()
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    if options.report:
        print(tables(runs))
        return
    if options.data is None:
        raise SystemExit("Give the directory of MNIST's four idx files with --data or LIGHTNING_LAMB_DATA.")
    torch.set_num_threads(options.threads)
    data = load(options.data, options.device)
    facts = machine.describe(options.device) | {"threads": options.threads}
    facts["lightning_lamb"] = importlib.metadata.version("lightning-lamb")
    wanted = [*protocol_runs(options.models, options.batches, options.seeds)]
    wanted += control_runs(options.controls, options.seeds)
    for run in wanted:
        if run in map(identity, runs):
            continue
        runs.append(train(run, data))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "curve"}), flush=True)
        options.output.write_text(json.dumps({"machine": facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
