"""Trainings by Lightning in every layout, several in one set of processes: what the Lightning tests run on ranks."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from sharding.collectives import CountCollectives
from sharding.layouts import fsdp2, fsdp2_tp, hsdp, local_part, tp
from sharding.networks import INPUTS, OUTPUTS, Net
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from lightning_lamb import Lamb, LambMixin, LargeBatch
from lightning_lamb.callbacks import DeferredGradientSync
from lightning_lamb.sharding import clean_name
from lightning_lamb.strategies import CPUFSDPStrategy

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)

GLOBAL_BATCH, MICRO, SAMPLES, EPOCHS = 16, 2, 96, 2  # 6 optimizer steps per epoch
STEPS = SAMPLES // GLOBAL_BATCH * EPOCHS
WIDTH = 20  # tensor parallelism on four ranks needs a multiple of four

SHARD: dict[str, Callable[[int, Net], Any]] = {
    "fsdp2": fsdp2,
    "hsdp": lambda ranks, net: hsdp(net),
    "tp": tp,
    "fsdp2_tp": lambda ranks, net: fsdp2_tp(net),
}
"""Layouts that the module makes in ``configure_model``."""

FSDP1 = {"fsdp1": "FULL_SHARD", "fsdp1_grad_op": "SHARD_GRAD_OP", "fsdp1_hybrid": "HYBRID_SHARD"}


@dataclass(frozen=True)
class Job:
    """One ``fit``.

    Attributes:
        layout: "single", "ddp", "zero1" (sharded optimizer state), or a key of `FSDP1` or `SHARD`.
        ranks: processes.
        resume: name of a run that saved and its step, to continue from.
        save: name under which to write a checkpoint after every optimizer step.
        full: (FSDP2) one file instead of a folder.
        trainer: further options of the Trainer.
        strategy: (FSDP1) further options of the strategy.
        module: class attributes of the module.
        extra: names of further things to do: "count" collectives, "defer" gradients, a "scaler"; "stock": an optimizer
            that was built before the model was wrapped, as by the stock LightningCLI; "bare": no LargeBatch.
        steps: stop after so many, else after two epochs.
    """

    layout: str
    ranks: int
    resume: tuple[str, int] | None = None
    save: str | None = None
    full: bool = False
    trainer: tuple[tuple[str, Any], ...] = ()
    strategy: tuple[tuple[str, Any], ...] = ()
    module: tuple[tuple[str, Any], ...] = ()
    extra: tuple[str, ...] = ()
    steps: int = -1


@dataclass
class Result:
    """What each rank reports of a job.

    ``local`` is every tensor on it at the end, weights and optimizer state; ``masters`` those before each step, whole
    or this rank's slice.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    accumulation: int = 0
    schedule_steps: int = 0
    optimizer_steps: int = 0
    masters: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    collectives: dict[str, int] = field(default_factory=dict)
    failure: str = ""


class Positioned:
    """A loader that continues where its state says, in samples over all ranks."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.batch_size, self.rank, self.ranks, self.position = MICRO, rank, ranks, 0
        draw = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(SAMPLES, INPUTS, generator=draw)

    def __len__(self) -> int:
        return SAMPLES // (MICRO * self.ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.position = self.position, 0
        for first in range(start, SAMPLES, MICRO * self.ranks):
            self.position = (first + MICRO * self.ranks) % SAMPLES
            mine = self.inputs[first + self.rank * MICRO : first + (self.rank + 1) * MICRO]
            yield mine, mine[:, :OUTPUTS].sin()

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Data(LightningDataModule):
    batch_size = MICRO

    def train_dataloader(self) -> Positioned:
        ranks = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return Positioned(ranks["rank"], ranks["num_replicas"])


class Training(LightningModule):
    layout = "single"
    ranks = 1
    overflow_at: int | None = None
    """Batch whose loss is infinite, on the last rank only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(WIDTH)
        self.sharded = False
        self.result = Result()

    def configure_model(self) -> None:
        if not self.sharded and self.layout in SHARD:
            self.sharded = True
            SHARD[self.layout](self.ranks, self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        dtype = next(self.parameters()).dtype
        loss = (self.net(inputs.to(dtype)).float() - targets).square().sum(1).mean()
        last = self.global_rank == self.trainer.world_size - 1
        return loss * float("inf") if last and batch_idx == self.overflow_at else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.result.rates.append(float(optimizer.param_groups[0]["lr"]))
        self.result.masters[self.trainer.global_step] = self.held_masters(self.trainer.optimizers[0])

    def entries(self, optimizer: Any) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """Name, parameter and optimizer state."""
        pieces = {own.parameter: own.piece for own in getattr(optimizer, "_slices", [])}  # of a ShardedStateOptimizer
        for name, parameter in self.net.named_parameters():
            yield clean_name(name), parameter, optimizer.state.get(pieces.get(parameter, parameter), {})

    def held_masters(self, optimizer: Any) -> dict[str, Tensor]:
        held = {name: entry["master_weight"] for name, _, entry in self.entries(optimizer) if "master_weight" in entry}
        return {name: (m.full_tensor() if isinstance(m, DTensor) else m).clone() for name, m in held.items()}

    def on_train_end(self) -> None:
        optimizer = self.trainer.optimizers[0]
        self.result.accumulation = self.trainer.accumulate_grad_batches
        self.result.schedule_steps = max([c.scheduler.last_epoch for c in self.trainer.lr_scheduler_configs], default=0)
        states = [s for s in optimizer.state.values() if "step" in s]
        self.result.optimizer_steps = max((int(s["step"]) for s in states), default=0)
        for name, parameter, entry in self.entries(optimizer):
            held = {"weight": parameter} | entry
            self.result.local |= {f"{name} {key}": local_part(value).clone() for key, value in held.items()}
        self.result.weights = whole_weights(self.trainer.strategy.model, self.net)


class Module(LambMixin, Training):
    lamb_lr = 0.02
    lamb_options = {"weight_decay": 0.1}


class Stock(Training):
    """Its optimizer is there before the model is wrapped, as with the stock LightningCLI."""

    def __init__(self) -> None:
        super().__init__()
        self.early = Lamb(self.parameters(), lr=0.02, weight_decay=0.1)

    def configure_optimizers(self) -> Any:
        return self.early


class Counting(Callback):
    """Counts collectives from the first micro-batch of the second window to its end."""

    def __init__(self) -> None:
        self.mode: CountCollectives | None = None
        self.counts: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1 and self.mode is None:
            self.mode = CountCollectives()
            self.mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and self.mode is not None and not self.counts:
            self.mode.__exit__(None, None, None)
            self.counts = dict(self.mode.counts)


def whole_weights(model: nn.Module, net: nn.Module) -> dict[str, Tensor]:
    if any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model):
            return {clean_name(name): p.detach().clone() for name, p in net.named_parameters()}
    return {
        clean_name(name): (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
        for name, p in net.named_parameters()
    }


def strategy_of(job: Job) -> Any:
    sizes = {"tp": (1, job.ranks), "fsdp2_tp": (2, 2)}.get(job.layout, (job.ranks, 1))
    if job.layout in SHARD:
        return ModelParallelStrategy(*sizes, save_distributed_checkpoint=not job.full)
    if job.layout in FSDP1:
        options: dict[str, Any] = {"device_mesh": (2, 2)} if job.layout == "fsdp1_hybrid" else {}
        options["auto_wrap_policy"] = ModuleWrapPolicy({nn.LayerNorm})  # `wide` and `tied` share a weight: one unit
        return CPUFSDPStrategy(sharding_strategy=FSDP1[job.layout], **options, **dict(job.strategy))
    return {"ddp": "ddp", "zero1": "ddp"}.get(job.layout, "auto")


def callbacks_of(job: Job, counting: Counting, root: str) -> list[Any]:
    callbacks: list[Any] = []
    if "bare" not in job.extra:
        callbacks.append(LargeBatch(GLOBAL_BATCH, base_batch_size=4, warmup_steps=3))
    if "count" in job.extra:
        callbacks.append(counting)
    if "defer" in job.extra:
        callbacks.append(DeferredGradientSync())
    if job.save:
        often = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False}
        callbacks.append(ModelCheckpoint(Path(root, job.save), "{step}", **often))
    return callbacks


def run_job(job: Job, root: str = "") -> Result:
    attributes = {"layout": job.layout, "ranks": job.ranks, "lamb_shard_optimizer_state": job.layout == "zero1"}
    kind: Any = Module
    if "stock" in job.extra:
        kind = Stock
        del attributes["lamb_shard_optimizer_state"]
    module = type("Case", (kind,), attributes | dict(job.module))()
    counting = Counting()
    trainer = Trainer(
        accelerator="cpu",
        devices=job.ranks,
        strategy=strategy_of(job),
        max_epochs=EPOCHS,
        max_steps=job.steps,
        callbacks=callbacks_of(job, counting, root),
        enable_checkpointing=bool(job.save),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **dict(job.trainer),
        **({"plugins": [scaling_precision(job.layout)]} if "scaler" in job.extra else {}),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(root, job.resume[0], f"step={job.resume[1]}.ckpt") if job.resume else None
        trainer.fit(module, datamodule=Data(), ckpt_path=path)
    module.result.collectives = counting.counts
    return module.result


def scaling_precision(layout: str) -> Any:
    """16-mixed with a scaler on the CPU, where the Trainer's precision="16-mixed" means bf16."""
    if layout in FSDP1:
        from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        precision = FSDPPrecision("16-mixed")
        precision.scaler = ShardedGradScaler(device="cpu", init_scale=256.0)  # Lightning 2.6 refuses the argument
        return precision
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))


def run_jobs(jobs: list[Job], root: str = "") -> list[Result]:
    """Worker: one job after the other; an error ends its job only, if it is the same on all ranks."""
    found = []
    for job in jobs:
        try:
            found.append(run_job(job, root))
        except Exception:  # noqa: BLE001 - the test reports it
            found.append(Result(failure=traceback.format_exc()))
    return found
