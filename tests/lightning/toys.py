"""Small modules, data and a quiet Trainer for the tests in this folder."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from lightning_lamb import Lamb

logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*(does not have many workers|treespec|isinstance).*")


def quiet_trainer(**options: Any) -> Trainer:
    """A CPU Trainer that writes nothing."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(quiet | options))


def regression_data(samples: int, seed: int = 0) -> TensorDataset:
    """Inputs of 6 numbers and a smooth target."""
    inputs = torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return TensorDataset(inputs, inputs[:, :2].sin())


class Regression(LightningModule):
    """A small network in float64; keeps the learning rate and the first layer's gradient of every step."""

    def __init__(
        self, optimizer: Callable[..., Any] | None = None, scheduler: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2)).double()
        self.make_optimizer = optimizer or (lambda named: Lamb(named, lr=0.02))
        self.make_scheduler = scheduler
        self.rates: list[float] = []
        self.gradients: list[Tensor] = []
        self.micro_batches: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.micro_batches.append(len(inputs))
        return (self.net(inputs) - targets).pow(2).mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.named_parameters()))
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [self.make_scheduler(optimizer)]  # interval "epoch", as the stock CLI has it


class Recorder(Callback):
    """Keeps, in the module, what the optimizer gets: put it after LargeBatch."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        pl_module.rates.append(float(optimizer.param_groups[0]["lr"]))
        pl_module.gradients.append(next(pl_module.parameters()).grad.clone())


class Batches(LightningDataModule):
    """Unshuffled data, shared out over the ranks sample by sample."""

    def __init__(self, dataset: Dataset, batch_size: int, **options: Any) -> None:
        super().__init__()
        self.dataset, self.batch_size, self.options = dataset, batch_size, options

    def train_dataloader(self) -> DataLoader:
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(self.dataset, shuffle=False, **ranks)
        return DataLoader(self.dataset, self.batch_size, sampler=sampler, **self.options)


class Endless(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from regression_data(64)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest absolute difference of two sets of parameters."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)
