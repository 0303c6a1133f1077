"""The `train.py` that a reader of the docs has: a small model on random data, behind LambCLI, for one epoch."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_lamb import LambCLI


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Linear(8, 16)
        self.head = torch.nn.Linear(16, 2)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.head(torch.relu(self.embedding(inputs))), labels)


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        inputs = torch.randn(8192, 8)
        return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), self.batch_size)


if __name__ == "__main__":
    LambCLI(Model, Data, trainer_defaults={"max_epochs": 1, "accelerator": "cpu"})
