"""Handwritten digits: scikit-learn's 1797 small ones, or MNIST from its four idx files."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, random_split

MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
ENVIRONMENT_VARIABLE = "LIGHTNING_LAMB_DATA"


class DigitsData(LightningDataModule):
    """Images of digits, scaled to mean 0 and deviation 1, and their labels.

    Args:
        root: Directory with MNIST's idx files (plain or .gz, also in torchvision's MNIST/raw). None: the environment
            variable LIGHTNING_LAMB_DATA, and without that scikit-learn's digits, which need no download.
        batch_size: Samples per micro-batch and rank.
        num_workers: Processes that load data.
        seed: Seed of the splits and of the order of the samples.
    """

    def __init__(self, root: str | None = None, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.root = root or os.environ.get(ENVIRONMENT_VARIABLE)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None
        self.test_set: Dataset | None = None

    def setup(self, stage: str) -> None:
        if self.train_set is not None:
            return
        images, labels, test_images, test_labels = read_mnist(self.root) if self.root else read_sklearn(self.seed)
        mean, deviation = images.mean(), images.std()
        train = TensorDataset((images - mean) / deviation, labels)
        held_out = len(train) // 10
        splitter = torch.Generator().manual_seed(self.seed)
        self.train_set, self.val_set = random_split(train, [len(train) - held_out, held_out], splitter)
        self.test_set = TensorDataset((test_images - mean) / deviation, test_labels)

    def train_dataloader(self) -> DataLoader:
        # Its order depends on the seed and the epoch only, so a run resumed at the end of an epoch sees the same data.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(self.train_set, shuffle=True, seed=self.seed, **ranks)
        return DataLoader(self.train_set, self.batch_size, sampler=sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, 512, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test_set, 512, num_workers=self.num_workers)


def read_sklearn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1437 training and 360 test images of 8 x 8, with labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16.0
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[:360], order[360:]
    return images[train], labels[train], images[test], labels[test]


def read_mnist(root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """60000 training and 10000 test images of 28 x 28, with labels, from a directory of idx files."""
    tensors = []
    for images_name, labels_name in MNIST_FILES.values():
        tensors.append(read_idx(find_idx(root, images_name)).float().unsqueeze(1) / 255.0)
        tensors.append(read_idx(find_idx(root, labels_name)).long())
    images, labels, test_images, test_labels = tensors
    return images, labels, test_images, test_labels


def find_idx(root: str, name: str) -> Path:
    """The file called ``name`` or ``name.gz`` in ``root`` or ``root``/MNIST/raw."""
    folders = [Path(root).expanduser(), Path(root).expanduser() / "MNIST" / "raw"]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    problem = "holds no" if folders[0].is_dir() else "is no directory; it should hold"
    raise FileNotFoundError(
        f"data.root={root!r} {problem} {name} or {name}.gz. Give the directory of MNIST's four idx files with "
        f"--data.root or {ENVIRONMENT_VARIABLE}, or neither to train on scikit-learn's digits."
    )


def read_idx(path: Path) -> Tensor:
    """The array of bytes in an idx file: a magic number, the shape as big-endian integers, the data."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    zeros, kind, dimensions = struct.unpack(">HBB", content[:4]) if len(content) >= 4 else (1, 0, 0)
    if zeros != 0 or kind != 8:
        raise ValueError(f"{path} is no idx file of bytes: it starts with {content[:4]!r}. Download it again.")
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if data.size != int(np.prod(shape)):
        raise ValueError(f"{path} holds {data.size} bytes for the shape {shape}: it was cut off. Download it again.")
    return torch.from_numpy(data.reshape(shape).copy())
