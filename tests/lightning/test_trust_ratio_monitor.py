"""TrustRatioMonitor: what it logs, and which layers it warns about."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

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


class ZeroInitialised(Regression):
    """As LoRA's second matrix is: in the first step the layer is zero, and the layer before it has no gradient."""

    def __init__(self) -> None:
        super().__init__(lambda named: Lamb(named, lr=0.02, weight_decay=0.0))
        torch.nn.init.zeros_(self.net[3].weight)


def test_a_layer_that_begins_at_zero_and_moves_is_no_alarm(tmp_path: Path) -> None:
    """Both of its layers were warned about in step 1, which passes in step 2."""
    assert not warned_by(tmp_path, ZeroInitialised())


class Dead(ZeroInitialised):
    """Its zero layer never gets a gradient."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.net[3].weight.grad.zero_()


def test_zero_weights_and_zero_updates_that_stay_are_told_apart(tmp_path: Path) -> None:
    messages = warned_by(tmp_path, Dead())
    assert any("net.3.weight: all weights are still zero" in message for message in messages)
    assert any("net.0.weight: its update is zero" in message for message in messages)
    assert len(messages) == 2


class Exploding(Regression):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * float("nan")


def test_it_warns_without_a_logger(tmp_path: Path) -> None:
    """The checks stood behind the question whether there is a logger."""
    with pytest.warns(UserWarning, match="net.0.weight, net.3.weight: its norms are not finite"):
        trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), TrustRatioMonitor()], log_every_n_steps=1)
        trainer.fit(Exploding(), datamodule=Batches(regression_data(32), 4))


class Two(LightningModule):
    """Manual optimization of two networks, whose layers have the same names or others; the second explodes."""

    def __init__(self, optimizers: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.nets = torch.nn.ModuleList([torch.nn.Linear(6, 2).double() for _ in range(2)])
        self.make = optimizers

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for factor, optimizer, net in zip((1.0, float("nan")), self.optimizers(), self.nets):
            optimizer.zero_grad()
            self.manual_backward((net(batch[0]) - batch[1]).pow(2).mean() * factor)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [make(net) for make, net in zip(self.make, self.nets)]


def alike(net: torch.nn.Module) -> Lamb:
    return Lamb(net.named_parameters(), lr=0.01)


def prefixed(net: torch.nn.Module) -> Lamb:
    return Lamb(net.named_parameters("second"), lr=0.01)


def fit_two(folder: Path, *optimizers: Any, **options: Any) -> set[str]:
    trainer = quiet_trainer(
        max_steps=6,
        callbacks=[TrustRatioMonitor(["trust_ratio"], **options)],
        log_every_n_steps=1,
        logger=CSVLogger(folder),
    )
    trainer.fit(Two(optimizers), DataLoader(regression_data(32), 4))
    return {key for key in trainer.callback_metrics if "trust_ratio" in key}


def test_every_optimizer_is_shown_and_checked_under_manual_optimization(tmp_path: Path) -> None:
    """Only the first was; a second that exploded was silent."""
    with pytest.warns(UserWarning, match="TrustRatioMonitor: second.weight: its norms are not finite"):
        assert fit_two(tmp_path, alike, prefixed) == {"trust_ratio/weight", "trust_ratio/second.weight"}
    with pytest.warns(UserWarning, match="TrustRatioMonitor: optimizer1.weight: its norms"):
        found = fit_two(tmp_path, alike, alike)
    assert found == {"trust_ratio/optimizer0.weight", "trust_ratio/optimizer1.weight"}


def test_an_optimizer_beside_lamb_without_ratios_is_named(tmp_path: Path) -> None:
    adam = lambda net: torch.optim.Adam(net.parameters())
    with pytest.warns(UserWarning, match="shows nothing of Adam, which has no trust ratios"):
        assert fit_two(tmp_path, alike, adam) == {"trust_ratio/weight"}


def test_layers_that_match_nothing_are_told_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"layers='attention'\) matches none .* They are called net.0.weight, net.3.w"):
        fit(tmp_path, TrustRatioMonitor(layers="attention"))


def test_bounds_are_found_by_the_name_without_a_wrappers_prefix(tmp_path: Path) -> None:
    """A compiled module's parameters are called _orig_mod.weight, their ratios weight."""

    class Compiled(Regression):
        def __init__(self) -> None:
            super().__init__(lambda named: Lamb(named, lr=0.02, trust_ratio_bounds=(0.9, 1.0)))
            self.net = torch.compile(self.net, backend="eager")

    (message,) = warned_by(tmp_path, Compiled(), patience=2)
    assert "net.0.weight, net.3.weight: its trust ratio sits on trust_ratio_bounds" in message


def test_a_second_fit_warns_anew(tmp_path: Path) -> None:
    monitor = TrustRatioMonitor()
    for run in range(2):
        with pytest.warns(UserWarning, match="norms are not finite"):
            fit(tmp_path / str(run), monitor, Exploding())


def test_between_logging_steps_nothing_of_it_is_left_for_lightning_to_look_at(tmp_path: Path) -> None:
    """Lightning reads every number that was ever logged with self.log after every micro-batch: half as slow again."""
    left: list[int] = []

    class Watching(Regression):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            left.append(len(self.trainer._results))

    fit(tmp_path, TrustRatioMonitor(), Watching(), log_every_n_steps=4)
    assert [bool(count) for count in left] == [index % 8 == 7 for index in range(16)]


def test_numbers_that_are_none_are_reported(tmp_path: Path) -> None:
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
