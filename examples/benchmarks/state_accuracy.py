"""What moments in bfloat16 cost in accuracy: runs with `state_dtype=None` and `"bfloat16"`, over several seeds.

    python examples/benchmarks/state_accuracy.py --seeds 10

Handwritten digits (scikit-learn's 1797 real images of 8 x 8), a network of two hidden layers, 1437 images to train on
and 360 to test on. The seed decides split, initialisation and order, and is shared by both runs of a pair.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_lamb import Lamb

STATE_DTYPES = {"float32": None, "bfloat16": "bfloat16"}


def run(seed: int, state_dtype: str | None, epochs: int, batch_size: int) -> dict[str, float]:
    """Trains once.

    Returns:
        Loss on all training images, loss and accuracy on the test images.
    """
    torch.manual_seed(seed)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = Lamb(model.parameters(), lr=0.02, weight_decay=0.01, state_dtype=state_dtype)
    total = epochs * math.ceil(len(train) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * total), 1 - step / total)
    )
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return {
            "train_loss": _loss(model, images[train], labels[train]),
            "test_loss": _loss(model, images[test], labels[test]),
            "test_accuracy": 100 * (model(images[test]).argmax(1) == labels[test]).float().mean().item(),
        }


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return nn.functional.cross_entropy(model(images), labels).item()


def main() -> None:
    """Runs all pairs and prints means, standard deviations, and the mean difference within pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        name: [run(seed, dtype, args.epochs, args.batch_size) for seed in range(args.seeds)]
        for name, dtype in STATE_DTYPES.items()
    }
    for key in ("train_loss", "test_loss", "test_accuracy"):
        columns = {name: [each[key] for each in runs] for name, runs in found.items()}
        parts = [f"{name} {statistics.mean(v):.4f} (sd {statistics.stdev(v):.4f})" for name, v in columns.items()]
        differences = [narrow - wide for wide, narrow in zip(*columns.values())]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        print(f"{key}: {', '.join(parts)}; difference {statistics.mean(differences):+.4f} +- {error:.4f}")
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "runs": found}, indent=1)
        )


if __name__ == "__main__":
    main()
