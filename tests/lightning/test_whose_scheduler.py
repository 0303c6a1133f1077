"""Only what the stock LightningCLI made is converted to optimizer steps: an override of it is the user's word."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_lamb import LargeBatch
from tests.lightning.toys import Recorder, Regression, quiet_trainer, regression_data


class Plain(Regression):
    """Leaves its optimizer to the command line."""

    configure_optimizers = LightningModule.configure_optimizers

    def __init__(self) -> None:
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(regression_data(32), 4)


class PerEpoch(LightningCLI):
    """Says when the scheduler steps."""

    @staticmethod
    def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "epoch"}}


@pytest.mark.parametrize(
    ("cli", "rates"), [(LightningCLI, [0.02, 0.01, 0.005, 0.0025]), (PerEpoch, [0.02, 0.02, 0.01, 0.01])]
)
def test_the_stock_clis_scheduler_steps_per_optimizer_step_and_a_subclasss_as_it_says(cli: Any, rates: Any) -> None:
    """Lightning #15340: the stock CLI leaves every scheduler at one step per epoch."""
    options = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.02"]
    options += ["--lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--lr_scheduler.gamma", "0.5"]
    made = cli(Plain, run=False, save_config_callback=None, args=options, seed_everything_default=0)
    trainer = quiet_trainer(max_epochs=2, callbacks=[LargeBatch(16), Recorder()])
    trainer.fit(made.model)
    assert made.model.rates == pytest.approx(rates)
