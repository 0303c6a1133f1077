"""TrustRatioMonitor: what it logs, and which layers it warns about."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lamb import Lamb, LargeBatch, TrustRatioMonitor
from lightning_lamb.errors import InvalidOptionError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


def fit(
    folder: Path, monitor: TrustRatioMonitor, module: Regression | None = None, **options: Any
) -> list[dict[str, str]]:
    module = module or Regression()
    trainer = quiet_trainer(
        **(
            {
                "max_epochs": 2,
                "callbacks": [LargeBatch(8), monitor],
                "log_every_n_steps": 1,
                "logger": CSVLogger(folder),
            }
            | options
        )
    )
    trainer.fit(module, datamodule=Batches(regression_data(32), 4))
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_logs_every_layer_once_per_optimizer_step(tmp_path: Path) -> None:
    rows = fit(tmp_path, TrustRatioMonitor())
    assert [int(row["step"]) for row in rows] == list(range(8))
    for row in rows:
        for layer in ("net.0.weight", "net.3.weight"):
            ratio = float(row[f"weight_norm/{layer}"]) / float(row[f"update_norm/{layer}"])
            assert float(row[f"trust_ratio/{layer}"]) == pytest.approx(ratio, rel=1e-6)


def test_quantities_layers_and_logging_interval_are_choices(tmp_path: Path) -> None:
    monitor = TrustRatioMonitor(quantities=["trust_ratio"], layers=r"net\.3")
    rows = fit(tmp_path, monitor, log_every_n_steps=4)
    assert [int(row["step"]) for row in rows] == [3, 7]
    assert {key for key in rows[0] if "/" in key} == {"trust_ratio/net.3.weight"}


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, TrustRatioMonitor())
    assert not [w for w in caught if "TrustRatioMonitor" in str(w.message)]


def warned_by(folder: Path, module: Regression, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, TrustRatioMonitor(**options), module)
    return [str(w.message) for w in caught if "TrustRatioMonitor" in str(w.message)]


def test_a_ratio_on_its_bound_is_worth_one_warning(tmp_path: Path) -> None:
    module = Regression(lambda named: Lamb(named, lr=0.02, trust_ratio_bounds=(0.9, 1.0)))
    (message,) = warned_by(tmp_path, module, patience=2)
    assert "net.0.weight, net.3.weight: its trust ratio sits on trust_ratio_bounds" in message
    assert "Widen the bounds" in message


def test_zero_weights_and_zero_updates_are_told_apart(tmp_path: Path) -> None:
    class HalfDead(Regression):
        def __init__(self) -> None:
            super().__init__(lambda named: Lamb(named, lr=0.02, weight_decay=0.0))
            torch.nn.init.zeros_(self.net[3].weight)  # then the first layer has no gradient in the first step

    messages = warned_by(tmp_path, HalfDead())
    assert any("net.3.weight: all weights are zero" in message for message in messages)
    assert any("net.0.weight: its update is zero" in message for message in messages)
    assert len(messages) == 2


def test_numbers_that_are_none_are_reported(tmp_path: Path) -> None:
    class Exploding(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * float("nan")

    (message,) = warned_by(tmp_path, Exploding())
    assert "not finite" in message
    assert "lower the learning rate" in message


def test_an_optimizer_without_ratios_and_bad_options_are_refused(tmp_path: Path) -> None:
    module = Regression(lambda named: torch.optim.AdamW([p for _, p in named]))
    with pytest.raises(InvalidOptionError, match="AdamW does not have"):
        fit(tmp_path, TrustRatioMonitor(), module)
    with pytest.raises(InvalidOptionError, match="quantities"):
        TrustRatioMonitor(quantities=["ratio"])
    with pytest.raises(InvalidOptionError, match="regular expression"):
        TrustRatioMonitor(layers="(")
    with pytest.raises(InvalidOptionError, match="patience"):
        TrustRatioMonitor(patience=0)
