"""Trainings under `LambDeepSpeedStrategy`: a small network, unshuffled data, the same steps in float64 without it."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

SAMPLES, BATCH, LR = 72, 16, 0.02
BUCKETS = {"reduce_bucket_size": 10000, "allgather_bucket_size": 10000}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2))


def data() -> TensorDataset:
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :2].sin())


def lightning_parts() -> Any:
    """Lightning and a module class; made in the ranks, so that this file imports without Lightning."""
    import lightning.pytorch as pl

    from lightning_lamb import LambMixin

    class Model(LambMixin, pl.LightningModule):
        lamb_lr = LR
        net: nn.Module

        def __init__(self, **attributes: Any) -> None:
            super().__init__()
            if not attributes.pop("late", False):
                self.net = network()
            self.norms: list[float] = []
            self.rates: list[float] = []
            for name, value in attributes.items():
                setattr(self, name, value)

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                self.net = network()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).pow(2).mean()

        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("test_loss", (self.net(batch[0]) - batch[1]).pow(2).mean())

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))

        def on_train_batch_end(self, *arguments: Any) -> None:
            norm = self.trainer.strategy.deepspeed_engine.get_global_grad_norm()
            self.norms.append(float("nan") if norm is None else float(norm))

    return pl, Model


class Loaders:
    """A data module of unshuffled samples, each rank its share."""

    def __new__(cls, micro_batch: int) -> Any:
        import lightning.pytorch as pl

        class Module(pl.LightningDataModule):
            batch_size = micro_batch

            def train_dataloader(self) -> DataLoader:
                sampler = DistributedSampler(data(), shuffle=False, **self.trainer.distributed_sampler_kwargs)
                return DataLoader(data(), micro_batch, sampler=sampler)

        return Module()


def fit(
    stage: int,
    *,
    micro_batch: int = 2,
    epochs: int = 1,
    callbacks: Any = (),
    model: Any = None,
    config: Any = None,
    resume: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Trains on the ranks of this worker; returns trainer and module."""
    pl, Model = lightning_parts()
    from lightning_lamb.deepspeed import LambDeepSpeedStrategy

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    strategy_options = options.pop("strategy_options", {})
    kind = options.pop("strategy", LambDeepSpeedStrategy)
    full = {"zero_optimization": {"stage": stage, **BUCKETS}, "steps_per_print": 10**9, **(config or {})}
    model = Model() if model is None else model
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size() if torch.distributed.is_initialized() else int(ranks()),
        strategy=kind(config=full, logging_level=logging.ERROR, **strategy_options),
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(model, datamodule=Loaders(micro_batch), ckpt_path=resume)
    return trainer, model


def ranks() -> str:
    """How many ranks this worker is one of."""
    return os.environ["WORLD_SIZE"]


def weights_of(trainer: Any) -> dict[str, np.ndarray]:
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, p in trainer.strategy.deepspeed_engine.module.named_parameters():
        value = safe_get_full_fp32_param(p)
        found[name] = (p.detach() if value is None else value).detach().double().numpy().copy()
    return found


def expected(
    windows: list[list[int]],
    lr: float = LR,
    clip: float | None = None,
    schedule: Any = None,
    scales: Any = None,
    ratios: list[dict[str, float]] | None = None,
) -> dict[str, np.ndarray]:
    """An unsharded float64 run of plain torch: one step per window of sample indices.

    ``ratios`` receives the trust ratios of every step.
    """
    from lightning_lamb import Lamb, StagedWarmup

    model = nn.ModuleDict({"net": network()}).double()
    optimizer = Lamb(model.named_parameters(), lr=lr)
    scheduler = None if schedule is None else StagedWarmup(optimizer, **schedule)
    inputs, targets = (tensor.double() for tensor in data().tensors)
    for index, window in enumerate(windows):
        optimizer.zero_grad()
        loss = (model["net"](inputs[window]) - targets[window]).pow(2).mean()
        (loss * (1.0 if scales is None else scales[index])).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if ratios is not None:
            ratios.append({name: float(ratio) for name, ratio in optimizer.trust_ratios.items()})
        if scheduler is not None:
            scheduler.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def loss_at(weights: dict[str, np.ndarray]) -> float:
    """The loss over all samples, in float64."""
    model = nn.ModuleDict({"net": network()}).double()
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    inputs, targets = (tensor.double() for tensor in data().tensors)
    return float((model["net"](inputs) - targets).pow(2).mean().detach())


def windows_of(batch: int, epochs: int = 1) -> list[list[int]]:
    """Consecutive samples: with a DistributedSampler, what all ranks see until a step."""
    one = [list(range(SAMPLES))[start : start + batch] for start in range(0, SAMPLES, batch)]
    return one * epochs


def from_config(pl: Any) -> Any:
    class FromConfig(pl.LightningModule):
        """Leaves optimizer and schedule to the DeepSpeed config."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.rates: list[float] = []

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).pow(2).mean()

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))

        def configure_optimizers(self) -> None:
            return None

    return FromConfig()
