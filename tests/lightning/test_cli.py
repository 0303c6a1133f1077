"""The command line, as users call it: the stock LightningCLI and LambCLI, as subprocesses and in this process."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_lamb import GroupRules, Lamb, LambCLI, LargeBatch, Lars, StagedWarmup
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.lightning.toys import Batches, Regression, regression_data

ROOT = Path(__file__).parents[2]
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}

SCRIPT = """
import torch
{imports}
from tests.lightning.toys import Batches, Regression, regression_data

class Data(Batches):
    def __init__(self, batch_size: int = 4):
        super().__init__(regression_data(32), batch_size)

class Model(Regression):
    def __init__(self, width: int = 3):
        super().__init__()

if __name__ == "__main__":
    {cli}(Model, Data, trainer_defaults={defaults})
"""


def run_script(
    folder: Path, cli: str, *arguments: str, imports: str = "", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Writes a training script and runs it as a user does; checkpoints and logs go to ``folder``."""
    module = "lightning_lamb" if cli == "LambCLI" else "lightning.pytorch.cli"
    script = folder / "train.py"
    source = SCRIPT.replace("{cli}", cli).replace("{imports}", f"{imports}\nfrom {module} import {cli}")
    script.write_text(source.replace("{defaults}", repr(QUIET | {"default_root_dir": str(folder)})))
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(result.stdout + result.stderr)
    return result


def logged_rates(folder: Path) -> list[float]:
    """The learning rates that LearningRateMonitor wrote to the CSV log, once per optimizer step."""
    (path,) = folder.glob("csv/**/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    column = min(name for name in rows[0] if name.startswith("lr"))  # of the first group
    return list({row["step"]: float(row[column]) for row in rows if row[column]}.values())


LOG_RATES = [
    "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.logger.save_dir=csv",
    "--trainer.log_every_n_steps=1",
    "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",
    "--trainer.callbacks.logging_interval=step",
]
RAMP = [0.01, 0.02, 0.03, 0.04, 0.02, 0.015, 0.01, 0.005]  # 8 steps, 4 of them warm-up to 0.02 * sqrt(8 / 2)

TIMM = """
try:
    import timm.optim  # its Lamb must not be taken for ours
except ImportError:
    from torch.optim import Optimizer
    class Lamb(Optimizer): pass
"""


def test_stock_cli_with_large_batch_warms_up_per_optimizer_step(tmp_path: Path) -> None:
    """Without LargeBatch this takes 4 epochs to warm up (Lightning #15340)."""
    run_script(
        tmp_path,
        "LightningCLI",
        "fit",
        "--optimizer=lightning_lamb.Lamb",
        "--optimizer.lr=0.02",
        "--trainer.max_epochs=2",
        "--trainer.callbacks+=lightning_lamb.LargeBatch",
        "--trainer.callbacks.global_batch_size=8",
        "--trainer.callbacks.base_batch_size=2",
        "--trainer.callbacks.warmup_steps=4",
        *LOG_RATES,
    )
    assert logged_rates(tmp_path) == pytest.approx(RAMP)


def test_lamb_cli_takes_its_own_lamb_beside_timms_and_round_trips_its_config(tmp_path: Path) -> None:
    arguments = [
        "fit",
        "--optimizer=Lamb",
        "--optimizer.lr=0.02",
        "--optimizer.betas=[0.9,0.98]",
        "--lr_scheduler=StagedWarmup",
        "--lr_scheduler.warmup_steps=4",
        "--param_groups.no_decay_names=['net.3']",
        "--trainer.max_epochs=2",
        "--trainer.callbacks+=lightning_lamb.LargeBatch",
        "--trainer.callbacks.global_batch_size=8",
        "--trainer.callbacks.base_batch_size=2",
        *LOG_RATES,
    ]
    printed = run_script(tmp_path, "LambCLI", *arguments, "--print_config", imports=TIMM).stdout
    config = tmp_path / "config.yaml"
    config.write_text(printed)
    assert yaml.safe_load(printed)["optimizer"]["class_path"] in (
        "lightning_lamb.Lamb",
        "lightning_lamb.optimizers.Lamb",
    )
    run_script(tmp_path, "LambCLI", "fit", "--config", str(config), imports=TIMM)
    assert logged_rates(tmp_path) == pytest.approx(RAMP)
    again = run_script(tmp_path, "LambCLI", "fit", "--config", str(config), "--print_config", imports=TIMM).stdout
    assert yaml.safe_load(again) == yaml.safe_load(printed)


def test_help_is_readable(tmp_path: Path) -> None:
    overview = run_script(tmp_path, "LambCLI", "fit", "--help").stdout
    assert "The optimizer: Lamb, Lars" in overview
    assert "(<class" not in overview
    assert "regular expressions; a parameter whose name contains a match has no weight decay" in " ".join(
        overview.split()
    )
    options = run_script(tmp_path, "LambCLI", "fit", "--optimizer.help=Lamb").stdout
    for name in ("lr", "betas", "weight_decay", "bias_correction", "trust_ratio_bounds", "exempt_1d", "max_grad_norm"):
        assert f"--optimizer.{name} " in options
    assert "bound on the norm of all gradients together" in " ".join(options.split())


# ---- in this process


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns about pytest's arguments otherwise."""
    monkeypatch.setattr(sys, "argv", ["train.py"])


class Data(Batches):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__(regression_data(32), batch_size)


class Model(Regression):
    def __init__(self, width: int = 3) -> None:
        super().__init__()


def cli(*arguments: str, model: type = Model) -> LambCLI:
    defaults = QUIET | {"logger": False, "max_epochs": 1}
    return LambCLI(model, Data, args=["fit", *arguments], save_config_callback=None, trainer_defaults=defaults)


def optimizer_of(*arguments: str) -> Any:
    return cli(*arguments).trainer.optimizers[0]


def test_the_optimizer_knows_names_and_every_option() -> None:
    optimizer = optimizer_of(
        "--optimizer=Lamb", "--optimizer.max_grad_norm=1.0", "--optimizer.trust_ratio_bounds=[0.01,10]"
    )
    assert type(optimizer) is Lamb
    assert set(optimizer.trust_ratios) == {"net.0.weight", "net.3.weight"}
    assert optimizer.param_groups[0]["max_grad_norm"] == 1.0
    assert tuple(optimizer.param_groups[0]["trust_ratio_bounds"]) == (0.01, 10)
    assert type(optimizer_of("--optimizer=Lars", "--optimizer.lr=0.01")) is Lars


def test_group_rules_come_from_the_command_line() -> None:
    optimizer = optimizer_of(
        "--optimizer=Lamb", "--param_groups.no_adapt_names=['net.3']", "--param_groups.no_decay_1d=false"
    )
    assert set(optimizer.trust_ratios) == {"net.0.weight"}
    assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups)
    by_type = optimizer_of(
        "--optimizer=Lamb", "--param_groups.no_decay_types=['Linear']", "--param_groups.no_decay_1d=false"
    )
    assert sorted((group["weight_decay"], group["adapt"]) for group in by_type.param_groups) == [
        (0.0, False),  # biases of the linear layers
        (0.0, True),  # their weights
        (0.01, False),  # the layer norm
    ]


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InvalidOptionError, match="embedding"):
        cli("--optimizer=Lamb", "--param_groups.no_decay_names=['embedding']")


def test_presets_work_by_class_path() -> None:
    optimizer = optimizer_of("--optimizer=lightning_lamb.presets.deepspeed_lamb", "--optimizer.lr=0.01")
    assert type(optimizer) is Lamb
    assert optimizer.param_groups[0]["bias_correction"] == "lr"
    assert "net.0.weight" in optimizer.trust_ratios


def test_other_optimizers_and_their_groups_still_work() -> None:
    assert type(optimizer_of("--optimizer=AdamW", "--optimizer.lr=0.01")) is torch.optim.AdamW
    grouped = optimizer_of(
        "--optimizer=AdamW", "--optimizer.weight_decay=0.1", "--param_groups.no_decay_names=['net.3']"
    )
    assert sorted(group["weight_decay"] for group in grouped.param_groups) == [0.0, 0.1]
    assert "adapt" not in grouped.param_groups[0]


def test_the_schedulers_length_comes_from_the_trainer() -> None:
    staged = cli("--optimizer=Lamb", "--lr_scheduler=StagedWarmup", "--lr_scheduler.warmup_fraction=0.25")
    assert staged.trainer.lr_scheduler_configs[0].scheduler.total_steps == 8
    one_cycle = cli("--optimizer=Lamb", "--lr_scheduler=OneCycleLR", "--lr_scheduler.max_lr=0.1")
    assert one_cycle.trainer.lr_scheduler_configs[0].scheduler.total_steps == 8
    assert one_cycle.trainer.lr_scheduler_configs[0].interval == "step"


def test_the_interval_can_be_an_epoch() -> None:
    trainer = cli(
        "--optimizer=Lamb", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5", "--lr_interval=epoch"
    ).trainer
    assert trainer.lr_scheduler_configs[0].interval == "epoch"
    trainer = cli(
        "--optimizer=Lamb",
        "--lr_scheduler=ExponentialLR",
        "--lr_scheduler.gamma=0.5",
        "--lr_interval=epoch",
        "--trainer.callbacks+=lightning_lamb.LargeBatch",
        "--trainer.callbacks.global_batch_size=8",
    ).trainer
    assert trainer.lr_scheduler_configs[0].interval == "epoch"


def test_plateau_schedulers_keep_their_monitor() -> None:
    class Monitored(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    made = cli("--optimizer=Lamb", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=loss", model=Monitored)
    assert made.trainer.lr_scheduler_configs[0].monitor == "loss"


def test_the_optimizers_state_can_be_divided() -> None:
    optimizer = optimizer_of("--optimizer=lightning_lamb.Lars", "--shard_optimizer_state=true", "--optimizer.lr=0.03")
    assert (type(optimizer), optimizer.optimizer_class) == (ShardedStateOptimizer, Lars)
    assert optimizer.param_groups[0]["lr"] == 0.03
    with pytest.raises(InvalidOptionError, match=r"AdamW: leave it out"):
        optimizer_of("--optimizer=torch.optim.AdamW", "--shard_optimizer_state=true")


def test_without_an_optimizer_the_module_keeps_its_own() -> None:
    assert cli().trainer.optimizers[0].param_groups[0]["lr"] == 0.02


class LateLayers(Model):
    """Layers that exist only after configure_model; the stock CLI finds no parameters then (Lightning #16489)."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.made = self.net
        self.net = torch.nn.Identity()
        del self.made

    def configure_model(self) -> None:
        self.net = Regression().net


def test_layers_made_in_configure_model_train() -> None:
    trained = cli("--optimizer=Lamb", "--optimizer.lr=0.1", model=LateLayers)
    assert float((trained.model.net[0].weight - Regression().net[0].weight).detach().abs().max()) > 0.0


def test_double_clipping_is_refused() -> None:
    with pytest.raises(ConflictError, match="clipped twice"):
        cli("--optimizer=Lamb", "--optimizer.max_grad_norm=1.0", "--trainer.gradient_clip_val=1.0")


def test_a_subclass_can_replace_the_building() -> None:
    class Mine(LambCLI):
        def build_optimizers(self, module: Any) -> Any:
            return Lamb(module.named_parameters(), lr=0.123)

    made = Mine(
        Model,
        Data,
        args=["fit", "--optimizer=Lamb"],
        save_config_callback=None,
        trainer_defaults=QUIET | {"logger": False, "max_epochs": 1},
    )
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == 0.123


def test_large_batch_and_stages_come_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
optimizer: {class_path: lightning_lamb.Lamb, init_args: {lr: 0.02}}
lr_scheduler:
  class_path: lightning_lamb.StagedWarmup
  init_args: {stages: [{steps: 3, warmup_steps: 2, lr: 0.01}, {steps: 1, lr: 5e-3}]}
trainer:
  callbacks:
    - {class_path: lightning_lamb.LargeBatch, init_args: {global_batch_size: 8}}
"""
    )
    made = cli(f"--config={config}")
    assert isinstance(made.trainer.lr_scheduler_configs[0].scheduler, StagedWarmup)
    assert made.trainer.lr_scheduler_configs[0].scheduler.total_steps == 4 == made.trainer.global_step
    assert any(isinstance(callback, LargeBatch) for callback in made.trainer.callbacks)
    assert made.config_init.fit.param_groups == GroupRules()
