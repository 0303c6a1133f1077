"""A two-stage training with everything that makes resuming hard: shuffled data, dropout, statistics, augmentation."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lamb import LambMixin, LargeBatch
from tests.lightning.toys import quiet_trainer

STAGES = [
    {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "warmup_steps": 2, "lr": 0.02, "data": {"length": 3}},
    {"steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "warmup_steps": 2, "lr": 0.01, "data": {"length": 5}},
]
SAMPLES = 20  # epochs of 2.5 windows of 8: one ends on a short window, and stage 1 ends in the middle of another


logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").setLevel(logging.WARNING)


class Noisy(Dataset):
    """Samples of `length` numbers; with ``augment`` they draw from all three global generators."""

    def __init__(self, length: int, augment: bool) -> None:
        self.length, self.augment = length, augment

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        sample = torch.sin(torch.arange(self.length, dtype=torch.float64) * (index + 1.0))
        if self.augment:
            noise = torch.rand(1, dtype=torch.float64) + random.random() + np.random.rand()  # noqa: NPY002
            sample = sample + 0.01 * noise
        return sample


class StagedData(LightningDataModule):
    def __init__(self, augment: bool = False, workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.length, self.augment, self.workers = 1, 1, augment, workers

    def train_dataloader(self) -> DataLoader:
        data = Noisy(self.length, self.augment)
        return DataLoader(data, self.batch_size, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(self.length, self.augment), 5)


class Staged(LambMixin, LightningModule):
    """Keeps what every optimizer step saw."""

    lamb_lr = 0.02
    dropout = 0.0
    norm = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm: nn.Module = nn.BatchNorm1d(6) if self.norm else nn.LayerNorm(6)
        self.net = nn.Sequential(nn.Linear(1, 6), norm, nn.Dropout(self.dropout), nn.Tanh(), nn.Linear(6, 1)).double()
        self.micro_batches: list[tuple[int, ...]] = []
        self.steps: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.micro_batches.append(tuple(batch.shape))
        inputs, targets = batch[:, :-1].reshape(-1, 1), batch[:, 1:].reshape(-1, 1)
        loss = (self.net(inputs) - targets).pow(2).mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.rand(3)  # what validation draws must not matter

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        samples = sum(shape[0] for shape in self.micro_batches)
        length = self.micro_batches[-1][1]
        self.steps.append({"samples": samples, "length": length, "lr": optimizer.param_groups[0]["lr"]})
        self.micro_batches = []


class Dropping(Staged):
    dropout = 0.3
    norm = True


class SaveEverywhere(Callback):
    """Saves after every micro-batch, and in the middle of each, as a run that is killed there would have."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        trainer.save_checkpoint(self.folder / f"{self.count:02d}-inside.ckpt")

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.count += 1
        trainer.save_checkpoint(self.folder / f"{self.count:02d}.ckpt")


def train_staged(
    module: Staged,
    data: LightningDataModule | None = None,
    resume: Path | str | None = None,
    callbacks: list[Callback] | None = None,
    stages: list[dict[str, Any]] | None = None,
    large_batch: LargeBatch | None = None,
    **options: Any,
) -> Trainer:
    large_batch = large_batch or LargeBatch(stages=stages or STAGES)
    trainer = quiet_trainer(callbacks=[large_batch, *(callbacks or [])], num_sanity_val_steps=0, **options)
    trainer.fit(module, datamodule=data or StagedData(), ckpt_path=None if resume is None else str(resume))
    return trainer


def everything(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
