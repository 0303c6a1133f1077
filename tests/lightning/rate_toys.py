"""Modules with a scheduler of the user's, for the tests of learning rates."""

from __future__ import annotations

from typing import Any

from torch.optim import lr_scheduler as torch_schedulers

from lightning_lamb import Lamb
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data

HALVING = lambda o: torch_schedulers.ExponentialLR(o, 0.5)


def fit(module: Any, *callbacks: Any, checkpoint: Any = None, micro_batch: int = 4, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": [*callbacks, Recorder()]} | options))
    trainer.fit(module, datamodule=Batches(regression_data(32), micro_batch), ckpt_path=checkpoint)
    return trainer


class Configured(Regression):
    """Its scheduler comes with what the user says about it."""

    def __init__(self, scheduler: Any = None, lr: float = 0.02, **config: Any) -> None:
        super().__init__(optimizer=lambda named: Lamb(named, lr=self.lr), scheduler=scheduler)
        self.config, self.lr = config, lr

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.named_parameters()))
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), **self.config}}


class Watches(Configured):
    """Logs what ReduceLROnPlateau watches: a loss that gets no better."""

    def on_train_epoch_end(self) -> None:
        self.log("watched", 1.0)
