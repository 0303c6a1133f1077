"""Every place where this package leans on Lightning's insides, and the choice between its two packages.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code under two names, whose classes do not mix: a module of
one is refused by the Trainer of the other. This file takes the one that the program already imported, otherwise the one
that is installed. Attributes without a promise of stability are read and written here and nowhere else; the functions
say which, and ``tests/lightning/test_seams.py`` fails where a new Lightning changes one.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lamb.errors import MissingDependencyError, PlanError

__all__ = ["Callback", "LRSchedulerConfig", "LightningModule", "Trainer", "pl"]
"""Lightning's names that the other modules take from here."""

LIGHTNING_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def load_lightning() -> ModuleType:
    """Imports the Lightning package that this program uses.

    Returns:
        ``lightning.pytorch`` or ``pytorch_lightning``: the one imported already (the first, if both are), otherwise the
        one installed (the first, if both are).

    Raises:
        MissingDependencyError: neither is installed.
    """
    for name in LIGHTNING_PACKAGES:
        if name in sys.modules:
            return sys.modules[name]
    for name in LIGHTNING_PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:  # noqa: PERF203 - two rounds
            if error.name not in (name, name.split(".", maxsplit=1)[0]):
                raise  # installed, but something that it needs is not: that message is the better one
    raise MissingDependencyError(
        "LambMixin, LargeBatch, TrustRatioMonitor and LambCLI need Lightning, and neither `lightning` nor "
        '`pytorch_lightning` is installed: `pip install "lightning_lamb[lightning]"` (or `pip install lightning`). '
        "Lamb, Lars and StagedWarmup work without it."
    )


if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.types import LRSchedulerConfig
else:
    pl = load_lightning()
    Callback, LightningModule, Trainer = pl.Callback, pl.LightningModule, pl.Trainer
    LRSchedulerConfig = importlib.import_module(f"{pl.__name__}.utilities.types").LRSchedulerConfig

_rank_zero = importlib.import_module(f"{pl.__name__}.utilities.rank_zero")
rank_zero_info = _rank_zero.rank_zero_info
rank_zero_warn = _rank_zero.rank_zero_warn


def load_cli() -> ModuleType:
    """The Lightning package's ``cli`` module.

    Raises:
        MissingDependencyError: jsonargparse, which every LightningCLI needs, is not installed.
    """
    try:
        importlib.import_module("jsonargparse")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            'LambCLI needs jsonargparse, which is not installed: `pip install "lightning_lamb[cli]"` '
            '(or `pip install "jsonargparse[signatures]"`).'
        ) from error
    return importlib.import_module(f"{pl.__name__}.cli")


# ---- what is running here


def attached_trainer(module: nn.Module) -> Any:
    """The Trainer that runs ``module``, or None: in Fabric, or outside any. Reads ``LightningModule._trainer``."""
    return getattr(module, "_trainer", None)


def module_that_knows(trainer: Any, module: nn.Module) -> nn.Module:
    """The module that knows its parameters' true names and shapes.

    Under FSDP1 that is the wrapper, which alone knows what its slices are slices of; everywhere else the module itself,
    whose names carry no prefix of the wrapper. Reads ``strategy.model``.

    Args:
        trainer: the Trainer, or None (Fabric, or no trainer at all).
        module: the LightningModule.
    """
    wrapper: nn.Module | None = None if trainer is None else trainer.strategy.model
    return wrapper if wrapper is not None and type(wrapper).__name__ == "FullyShardedDataParallel" else module


def data_parallel_size(trainer: Trainer) -> int:
    """How many ranks see different samples. Under tensor parallelism that is less than the world size."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def strategy_accumulates(trainer: Trainer) -> bool:
    """Whether the strategy accumulates by itself (DeepSpeed): then it never steps on a short window."""
    return bool(trainer.strategy.handles_gradient_accumulation)


def is_fitting(trainer: Trainer) -> bool:
    """Whether this is, or was last, a ``fit``, the validation in it included."""
    return trainer.state.fn == "fit"


def is_deepspeed(trainer: Trainer) -> bool:
    """Whether the strategy is DeepSpeed's: it clips by itself, and its parameters stay the module's."""
    return hasattr(type(trainer.strategy), "deepspeed_engine")


def closes_window(trainer: Trainer) -> bool:
    """Whether an optimizer step follows the present micro-batch. Reads ``fit_loop._should_accumulate``."""
    return not trainer.fit_loop._should_accumulate()


def reset_seed() -> None:
    """Seeds this process as Lightning's strategies do when they start."""
    fabric = "lightning_fabric" if pl.__name__ == "pytorch_lightning" else "lightning.fabric"
    importlib.import_module(f"{fabric}.utilities.seed").reset_seed()


STRATEGY_NAMES: dict[str, dict[str, Any]] = {
    "lamb_deepspeed": {},
    "lamb_deepspeed_stage_0": {"stage": 0},
    "lamb_deepspeed_stage_1": {"stage": 1},
    "lamb_deepspeed_stage_2": {"stage": 2},
    "lamb_deepspeed_stage_2_offload": {"stage": 2, "offload_optimizer": True},
    "lamb_deepspeed_stage_3": {"stage": 3},
    "lamb_deepspeed_stage_3_offload": {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
}


def register_strategies(build: Callable[..., Any]) -> None:
    """Makes ``Trainer(strategy="lamb_deepspeed_stage_2")`` and so on known.

    Args:
        build: makes the strategy from its options.
    """
    registry = importlib.import_module(f"{pl.__name__}.strategies").StrategyRegistry
    for name, options in STRATEGY_NAMES.items():
        registry.register(name, build, description="DeepSpeed for LAMB", override=True, **options)


# ---- the training data


def train_data_source(trainer: Trainer) -> Any:
    """Who gives the training data: a LightningModule, a LightningDataModule, or the loader handed to ``fit``.

    Reads ``fit_loop._data_source``.
    """
    return trainer.fit_loop._data_source.instance


def present_loaders(trainer: Trainer) -> Any:
    """The CombinedLoader that training iterates over now (``flattened`` lists its loaders), or None.

    Reads ``fit_loop._combined_loader``.
    """
    return trainer.fit_loop._combined_loader


def load_train_data(trainer: Trainer) -> list[Any]:
    """The training dataloaders, as the Trainer will use them; loads them if it has not happened yet.

    Calls ``fit_loop.setup_data()`` and reads ``fit_loop._combined_loader``.
    """
    trainer.fit_loop.setup_data()
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def drop_data(trainer: Trainer, *, validation: bool) -> None:
    """Forgets the training dataloader, so that the next epoch makes a new one. Writes ``_combined_loader``.

    Args:
        trainer: between two epochs.
        validation: forget the validation dataloaders too.
    """
    trainer.fit_loop._combined_loader = None
    if validation:
        trainer.fit_loop.epoch_loop.val_loop._combined_loader = None


def end_epoch(trainer: Trainer) -> None:
    """Makes the present micro-batch the last of its epoch; call it in ``on_train_batch_end`` at the end of a window.

    The public way, -1 from ``on_train_batch_start``, costs a step of the scheduler and the gradient of a micro-batch.
    Writes ``epoch_loop.batch_progress.is_last_batch``.
    """
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True


def limit_training(trainer: Trainer, max_steps: int) -> None:
    """Makes optimizer steps, and no epochs, the length of the training. Writes ``epoch_loop.max_steps``."""
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    trainer.fit_loop.max_epochs = -1


def drop_train_data_before_resume(trainer: Trainer) -> None:
    """Forgets loaders that were made before the checkpoint is restored, so that they are made again after it.

    A loader that exists already does not get its saved position back: Lightning issue #20550. Without a checkpoint the
    loader is kept. Reads ``_checkpoint_connector._loaded_checkpoint``, writes ``fit_loop._combined_loader``.
    """
    resuming = bool(trainer._checkpoint_connector._loaded_checkpoint)
    if resuming or trainer.strategy.restore_checkpoint_after_setup:  # these strategies read the checkpoint later
        trainer.fit_loop._combined_loader = None


def batches_per_epoch(trainer: Trainer) -> float:
    """Micro-batches per epoch and rank after all the Trainer's limits; infinite for a dataset without a length."""
    load_train_data(trainer)
    return trainer.num_training_batches


def steps_per_epoch(trainer: Trainer, batches: float) -> float:
    """Optimizer steps in ``batches`` micro-batches: a short last window counts, except where the strategy drops it."""
    if math.isinf(batches):
        return batches
    rounded = math.floor if strategy_accumulates(trainer) else math.ceil
    return max(1, rounded(batches / trainer.accumulate_grad_batches))


def total_optimizer_steps(trainer: Trainer) -> int:
    """How many optimizer steps this ``fit`` will make in all, from ``max_steps``, or from ``max_epochs`` and the data.

    Unlike ``estimated_stepping_batches`` it loads no data where ``max_steps`` alone decides, and what it loads does not
    cost a resumed run its position in the data (see `drop_train_data_before_resume`).

    Raises:
        PlanError: training has no end, or the dataset has no length and ``max_steps`` is missing.
    """
    max_steps, max_epochs = trainer.max_steps, trainer.max_epochs
    if max_epochs is None or max_epochs == -1:
        if max_steps == -1:
            raise PlanError(
                "the schedule needs the total number of optimizer steps, and Trainer(max_epochs=-1, max_steps=-1) "
                "trains without end: set Trainer(max_steps=...), or StagedWarmup(total_steps=...)."
            )
        return max_steps
    was_loaded = trainer.fit_loop._combined_loader is not None
    batches = batches_per_epoch(trainer)
    if not was_loaded:
        drop_train_data_before_resume(trainer)
    if math.isinf(batches):
        if max_steps == -1:
            raise PlanError(
                "the schedule needs the total number of optimizer steps, and the training dataset has no length "
                f"(IterableDataset), so max_epochs={max_epochs} does not tell it: set Trainer(max_steps=...)."
            )
        return max_steps
    scheduled = _scheduled_accumulation(trainer)
    if scheduled is None:
        total = int(steps_per_epoch(trainer, batches)) * max_epochs
    else:  # the last window of an epoch may be short, whatever its accumulation
        total = sum(math.ceil(batches / scheduled(epoch)) for epoch in range(max_epochs))
    return total if max_steps == -1 else min(total, max_steps)


def _scheduled_accumulation(trainer: Trainer) -> Callable[[int], int] | None:
    """The accumulation of an epoch by a GradientAccumulationScheduler, or None if there is none in this Trainer."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # By name, because the two Lightning packages have a class of that name each.
        if any(kind.__name__ == "GradientAccumulationScheduler" for kind in type(callback).__mro__):
            return cast("Callable[[int], int]", callback.get_accumulate_grad_batches)
    return None


# ---- optimizers and schedulers


def scheduler_configs(trainer: Trainer) -> list[LRSchedulerConfig]:
    """The Trainer's records of its schedulers; ``interval`` in them may be changed before training starts."""
    return trainer.strategy.lr_scheduler_configs


def add_step_scheduler(trainer: Trainer, scheduler: Any, name: str) -> None:
    """Adds a scheduler that steps after every optimizer step. Appends to ``strategy.lr_scheduler_configs``."""
    trainer.strategy.lr_scheduler_configs.append(LRSchedulerConfig(scheduler=scheduler, interval="step", name=name))


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of Lightning and DeepSpeed, on which attributes can be read and written."""
    inner = getattr(optimizer, "_optimizer", optimizer)
    while not isinstance(inner, Optimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return inner


def device_of(module: nn.Module) -> torch.device:
    """Where a LightningModule computes."""
    device = getattr(module, "device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")
