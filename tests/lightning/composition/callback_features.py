"""Lightning's own callbacks. `test_features.py` fails where Lightning has one that is not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.loggers import CSVLogger

from tests.lightning.composition.cell import EPOCHS, CallbackFeature
from tests.lightning.composition.observed import unpacked


def logging_to(folder: Path) -> dict[str, Any]:
    """A logger for the callbacks that ask for one."""
    return {"logger": CSVLogger(folder)}


class UnfreezeHead(callbacks.BaseFinetuning):
    """Trains the head from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.head)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.head, optimizer, lr=0.003)


class Writer(callbacks.BasePredictionWriter):
    """Writes nothing."""


class Marker(callbacks.Callback):
    """A user's own."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert trainer.global_step >= 0


class Saver(callbacks.Checkpoint):
    """A user's own checkpoint callback: saves after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


class QuietBar(callbacks.ProgressBar):
    """A progress bar without a screen."""

    def disable(self) -> None: ...
    def enable(self) -> None: ...


LOG = {"logger": True, "log_every_n_steps": 2}
SAVE = {"enable_checkpointing": True}
BAR = {"enable_progress_bar": True}
TRIALS = {"min_lr": 1e-3, "max_lr": 1e-1, "num_training_steps": 20, "early_stop_threshold": None}

CALLBACKS = [
    CallbackFeature(
        "BackboneFinetuning",
        lambda folder: callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.5),
        rates="twin",
        remark="groups that it adds are scaled through the rate that it reads from the optimizer",
    ),
    CallbackFeature(
        "BaseFinetuning",
        lambda folder: UnfreezeHead(),
        rates="twin",
        remark="a learning rate that it gives to a late group is taken as it is",
    ),
    CallbackFeature(
        "BasePredictionWriter",
        lambda folder: Writer(),
        alone=True,
    ),
    CallbackFeature(
        "BatchSizeFinder",
        lambda folder: callbacks.BatchSizeFinder(steps_per_trial=1, init_val=2, max_trials=1),
        refused="BatchSizeFinder",
        ranks=(1,),
        place="datamodule",
    ),
    CallbackFeature(
        "Callback",
        lambda folder: Marker(),
        alone=True,
    ),
    CallbackFeature("Checkpoint", Saver, trainer=SAVE),
    CallbackFeature("DeviceStatsMonitor", lambda folder: callbacks.DeviceStatsMonitor(cpu_stats=True), trainer=LOG),
    CallbackFeature("EarlyStopping", lambda folder: callbacks.EarlyStopping("val", patience=1), epochs=2),
    CallbackFeature(
        "EarlyStopping on train_loss_window",
        lambda folder: callbacks.EarlyStopping("train_loss_window", patience=9, check_on_train_epoch_end=True),
    ),
    CallbackFeature(
        "GradientAccumulationScheduler",
        lambda folder: callbacks.GradientAccumulationScheduler({1: 2}),
        refused="GradientAccumulationScheduler",
    ),
    CallbackFeature(
        "LambdaCallback",
        lambda folder: callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, module: None),
        alone=True,
    ),
    CallbackFeature(
        "LearningRateFinder",
        lambda folder: callbacks.LearningRateFinder(**TRIALS),
        refused="LearningRateFinder",
        remark='what it finds belongs to the global batch; use it with `lr_scaling="none"`',
    ),
    CallbackFeature(
        'LearningRateFinder, `lr_scaling="none"`',
        lambda folder: callbacks.LearningRateFinder(**TRIALS),
        large_batch={"lr_scaling": "none"},
        trainer={"max_epochs": 5},
        rates="found",
        ranks=(1,),
        remark="its suggestion trains",
    ),
    CallbackFeature("LearningRateMonitor", lambda folder: callbacks.LearningRateMonitor("step"), trainer=LOG),
    CallbackFeature(
        "ModelCheckpoint",
        lambda folder: callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1),
        trainer=SAVE,
    ),
    CallbackFeature(
        "ModelPruning", lambda folder: callbacks.ModelPruning("l1_unstructured", amount=2), gradients=False
    ),
    CallbackFeature(
        "ModelSummary", lambda folder: callbacks.ModelSummary(), trainer={"enable_model_summary": True}, alone=True
    ),
    CallbackFeature("OnExceptionCheckpoint", lambda folder: callbacks.OnExceptionCheckpoint(folder), trainer=SAVE),
    CallbackFeature(
        "ProgressBar",
        lambda folder: QuietBar(),
        trainer=BAR,
        alone=True,
    ),
    CallbackFeature(
        "RichModelSummary",
        lambda folder: callbacks.RichModelSummary(),
        trainer={"enable_model_summary": True},
        alone=True,
    ),
    CallbackFeature("RichProgressBar", lambda folder: callbacks.RichProgressBar(), trainer=BAR),
    CallbackFeature(
        "StochasticWeightAveraging",
        lambda folder: callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1),
        refused="StochasticWeightAveraging",
        remark="use WeightAveraging",
    ),
    CallbackFeature("SpikeDetection", lambda folder: callbacks.SpikeDetection(window=3, warmup=1, atol=1e9)),
    CallbackFeature(
        "ThroughputMonitor",
        lambda folder: callbacks.ThroughputMonitor(lambda batch: len(unpacked(batch)[1]), window_size=4),
        trainer=LOG,
    ),
    CallbackFeature("Timer", lambda folder: callbacks.Timer({"hours": 1})),
    CallbackFeature("TQDMProgressBar", lambda folder: callbacks.TQDMProgressBar(), trainer=BAR),
    CallbackFeature("WeightAveraging", lambda folder: callbacks.WeightAveraging()),
    CallbackFeature("EMAWeightAveraging", lambda folder: callbacks.EMAWeightAveraging(decay=0.9)),
]

assert EPOCHS == 3, "EarlyStopping's row stops after two of three epochs"
torch.set_num_threads(1)
