"""Images in one folder per class, or made-up ones."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

IMAGE_ENDINGS = {".jpeg", ".jpg", ".png", ".bmp", ".webp"}
# Mean and deviation of ImageNet's red, green and blue, over pixels in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """``root/class/.../image``, classes numbered in the order of their names.

    Args:
        root: the folder of folders.
        size: pixels per side of what comes out.
        augment: cut out a random part and mirror at random; otherwise the middle, of 7/8 of the shorter side.
        seed: of the random parts, which depend on it, on the pass and on the image's number.

    Raises:
        FileNotFoundError: there is no folder of images.
    """

    def __init__(self, root: Path, size: int, augment: bool, seed: int = 0) -> None:
        folders = sorted(folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else []
        self.classes = [folder.name for folder in folders]
        self.images = [
            (path, label)
            for label, folder in enumerate(folders)
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in IMAGE_ENDINGS
        ]
        self.size, self.augment, self.seed, self.epoch = size, augment, seed, 0
        if not self.images:
            raise FileNotFoundError(
                f"{root} holds no images: it should have one folder per class with {', '.join(sorted(IMAGE_ENDINGS))} "
                "files in it. Give data.root, the folder that has train/ and val/, or leave it out for made-up images."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, label = self.images[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        random = np.random.default_rng((self.seed, self.epoch, index))
        box = random_box(image.size, random) if self.augment else middle_box(image.size)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        pixels = np.asarray(image, np.float32) / 255.0
        if self.augment and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        normalised = (pixels - np.float32(MEAN)) / np.float32(DEVIATION)
        return torch.from_numpy(normalised.transpose(2, 0, 1).copy()), torch.tensor(label)


class MadeUpImages(Dataset[tuple[Tensor, Tensor]]):
    """Noise around one colour per class: something to learn for whoever wants to check a plan without ImageNet.

    Args:
        count: images.
        classes: number of classes; image ``i`` is of class ``i % classes``.
        size: pixels per side.
        seed: of colours and noise.
    """

    def __init__(self, count: int, classes: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.colours = torch.randn(classes, 3, 1, 1, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        label = index % len(self.colours)
        noise = torch.Generator().manual_seed(self.seed + index)
        image = self.colours[label] + 0.5 * torch.randn(3, self.size, self.size, generator=noise)
        return image, torch.tensor(label)


class ImageData(LightningDataModule):
    """ImageNet, or any other folder with ``train/class/image`` and ``val/class/image``.

    Args:
        root: That folder. None: made-up images.
        batch_size: Images per micro-batch and rank.
        size: Pixels per side.
        num_workers: Processes that load images.
        seed: Of the order and of the augmentation.
        made_up: How many training images to make up without a root.
        classes: Of how many classes these are.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 256,
        size: int = 224,
        num_workers: int = 0,
        seed: int = 0,
        made_up: int = 1024,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.root = root
        self.batch_size = batch_size
        self.size = size
        self.num_workers = num_workers
        self.seed = seed
        self.made_up = made_up
        self.classes = classes
        self.train_set: Any = None
        self.val_set: Any = None

    def setup(self, stage: str) -> None:
        if self.train_set is not None:
            return
        if self.root is None:
            self.train_set = MadeUpImages(self.made_up, self.classes, self.size, self.seed)
            self.val_set = MadeUpImages(max(1, self.made_up // 10), self.classes, self.size, self.seed)
            return
        root = Path(self.root).expanduser()
        self.train_set = ImageFolder(root / "train", self.size, augment=True, seed=self.seed)
        self.val_set = ImageFolder(root / "val", self.size, augment=False)

    def train_dataloader(self) -> DataLoader:
        # Its order depends on the seed and the epoch only, so a run resumed at the end of an epoch sees the same data.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        sampler = EpochSampler(self.train_set, shuffle=True, seed=self.seed, **ranks)
        return DataLoader(
            self.train_set,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val_set, self.batch_size, num_workers=self.num_workers)


class EpochSampler(DistributedSampler):
    """DistributedSampler that tells the images the epoch too, before the workers of that epoch start."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning when an epoch begins."""
        super().set_epoch(epoch)
        self.dataset.epoch = epoch  # type: ignore[attr-defined]


def middle_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The middle square of 7/8 of the shorter side: what resizing to 256 and cutting out 224 shows."""
    width, height = size
    side = min(size) * 7 / 8
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(size: tuple[int, int], random: np.random.Generator) -> tuple[float, float, float, float]:
    """A part of 8 to 100 % of the image, 3:4 to 4:3 (Szegedy et al., arXiv 1409.4842); the middle if none fits."""
    width, height = size
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, upper = random.uniform(0, width - across), random.uniform(0, height - down)
            return left, upper, left + across, upper + down
    return middle_box(size)
