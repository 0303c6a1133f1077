"""The protocol of ymcui/LAMB_Optimizer_TF's comparison on MNIST: data, batches, optimizers, published numbers.

Source: https://github.com/ymcui/LAMB_Optimizer_TF at 8788e45e (2020-01-17, Apache-2.0): mnist_tensorflow.ipynb,
optimization.py and FULL_RESULTS.md, whose table is published.csv here.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from lightning_lamb import Lamb

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))
from digits_data import read_mnist

EPOCHS = 100
LR = 1e-3
TRAINING_IMAGES = 55_000
BATCHES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
OPTIMIZERS = ("Adam", "AdamW", "LAMB")


def optimizer_named(name: str, parameters: Iterable[Any], lr: float) -> Optimizer:
    """One of OPTIMIZERS, with the notebook's options.

    Its "AdamW" is BERT's AdamWeightDecayOptimizer at its default weight decay, which is 0: Adam without bias
    correction. Its LAMB adapts and decays every tensor, biases too, and corrects no bias.

    Args:
        name: "Adam", "AdamW" or "LAMB".
        parameters: (name, parameter) pairs.
        lr: learning rate, constant over the training.
    """
    named = list(parameters)
    if name == "Adam":
        return Adam([parameter for _, parameter in named], lr=lr, eps=1e-8, fused=True)
    if name == "AdamW":
        return Lamb(named, lr=lr, weight_decay=0.0, bias_correction=False, adapt=False)
    return Lamb(named, lr=lr, weight_decay=0.01, bias_correction=False, exempt_1d=False)


def load(root: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """55,000 training images and labels (the first 5000 of MNIST's are set aside) and the 10,000 test ones.

    Images are rows of 784 pixels in [0, 1].
    """
    images, labels, test_images, test_labels = read_mnist(root)
    tensors = (images[5000:].flatten(1), labels[5000:], test_images.flatten(1), test_labels)
    return tuple(tensor.to(device) for tensor in tensors)  # type: ignore[return-value]


def steps_per_epoch(batch: int) -> int:
    """The notebook's "epoch": 859 steps at batch 64, 3 at 16384."""
    return TRAINING_IMAGES // batch


def batches(images: Tensor, labels: Tensor, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as DataSet.next_batch gives them: each pass is shuffled, and a batch may reach into the next pass.

    Args:
        images: (samples, pixels).
        labels: (samples,).
        batch: samples per batch.
        steps: number of batches.
        seed: of the order.

    Yields:
        Images and labels; the image tensor is reused for the next batch.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    buffer = images.new_empty(batch, images.shape[1])
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        picked, order = order[:batch].to(images.device), order[batch:]
        yield torch.index_select(images, 0, picked, out=buffer), labels[picked]


def published() -> dict[tuple[int, str, str], float]:
    """Test accuracy in percent by (batch, optimizer, model): 135 cells, one run each."""
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8") as file:
        return {
            (int(row["batch"]), row["optimizer"], row["model"]): float(row["test_accuracy"])
            for row in csv.DictReader(file)
        }
