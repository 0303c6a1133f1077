"""What Lightning trains with under DeepSpeed: JSON entries, precisions, late initialisation, strategies by name."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import largest_error, on_ranks
from zero_training import LR, Loaders, expected, fit, from_config, lightning_parts, ranks, weights_of, windows_of

JSON = {
    "optimizer": {"type": "LightningLamb", "params": {"lr": LR}},
    "scheduler": {"type": "StagedWarmup", "params": {"total_steps": 5, "warmup_steps": 2}},
}
OPEN_END = {**JSON, "scheduler": {"type": "StagedWarmup", "params": {"warmup_steps": 2}}}
LAMB = {**JSON, "optimizer": {"type": "Lamb", "params": {"lr": LR}}}
FEW = ["json, stage 2", "json, stock strategy", "json, Lamb is ours", "bf16-mixed, stage 3", "zero.Init"]
OTHERS = [f"json, stage {stage}" for stage in (0, 3)]
OTHERS += [f"{precision}, stage {stage}" for precision in ("bf16-mixed", "bf16-true") for stage in (0, 1, 2, 3)]


def stock_strategy() -> Any:
    """Lightning's own strategy, without its refusal of the CPU and otherwise untouched."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    import lightning_lamb.deepspeed  # noqa: F401 - all that a user of that strategy adds

    class OnCPU(DeepSpeedStrategy):
        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

        def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
            import deepspeed

            return deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank),
                config=self.config,
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )[:2]

    return OnCPU


def trained(label: str) -> tuple[Any, Any]:
    """Trainer and module after an epoch of windows of 16 samples."""
    pl, Model = lightning_parts()
    kind, _, what = label.partition(", ")
    if label == "zero.Init":
        return fit(3, micro_batch=8, model=Model(late=True))
    if kind != "json":
        return fit(int(what[-1]), micro_batch=8, precision=kind)
    if what == "stock strategy":
        return fit(2, micro_batch=8, model=from_config(pl), config=JSON, strategy=stock_strategy())
    if what == "Lamb is ours":
        return fit(1, micro_batch=8, model=from_config(pl), config=LAMB, strategy_options={"lamb_is_ours": True})
    return fit(int(what[-1]), micro_batch=8, model=from_config(pl), config=OPEN_END)


def run_labels(labels: list[str]) -> dict[str, Any]:
    found = {}
    for label in labels:
        trainer, model = trained(label)
        groups = trainer.strategy.deepspeed_engine.basic_optimizer.param_groups
        found[label] = {
            "weights": weights_of(trainer),
            "rates": model.rates,
            "groups": [(len(group.get("param_names", [])), group["weight_decay"]) for group in groups],
        }
    return found


@pytest.mark.parametrize(
    "labels", [pytest.param(FEW, id="few"), pytest.param(OTHERS, id="the others", marks=pytest.mark.slow)]
)
def test_json_entries_precisions_and_late_initialisation_under_lightning(labels):
    windows = windows_of(16)
    exact, constant = expected(windows, schedule={"total_steps": 5, "warmup_steps": 2}), expected(windows)
    for label, one in on_ranks(run_labels, 2, labels)[0].items():
        if label.startswith("json"):
            assert one["rates"][:2] == pytest.approx([LR / 2, LR]), label
            assert largest_error(one["weights"], exact) <= 5e-6, label
        elif label == "zero.Init":  # its weights were drawn in the emptied model
            assert one["groups"] == [(2, 0.01), (4, 0.0)], "exemptions went by the shapes of emptied parameters"
        else:
            assert largest_error(one["weights"], constant) <= 3e-2, f"{label}: more than bfloat16's forward explains"


def run_cli(folder: str) -> dict[str, Any]:
    from lightning_lamb import LambCLI

    _, Model = lightning_parts()
    module = sys.modules[__name__]
    module.CliData = type(Loaders(8))  # type: ignore[attr-defined]
    module.CliModel = type("CliModel", (Model,), {})  # type: ignore[attr-defined]
    arguments = ["fit", "--trainer.strategy=lamb_deepspeed_stage_2", "--trainer.accelerator=cpu"]
    arguments += [f"--trainer.devices={ranks()}", "--trainer.max_epochs=1", "--trainer.logger=false"]
    arguments += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    arguments += ["--trainer.use_distributed_sampler=false", "--optimizer=Lamb", f"--optimizer.lr={LR}"]
    arguments += ["--lr_scheduler=StagedWarmup", "--lr_scheduler.warmup_steps=2"]
    arguments += [f"--trainer.default_root_dir={folder}"]
    cli = LambCLI(module.CliModel, module.CliData, args=arguments, save_config_callback=None)
    return {"weights": weights_of(cli.trainer), "strategy": type(cli.trainer.strategy).__name__}


@pytest.mark.slow
def test_the_strategy_is_known_to_the_cli_by_name(tmp_path):
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    found = on_ranks(run_cli, 2, str(tmp_path))[0]
    windows = windows_of(16)
    assert found["strategy"] == "LambDeepSpeedStrategy"
    exact = expected(windows, schedule={"total_steps": len(windows), "warmup_steps": 2})
    assert largest_error(found["weights"], exact) <= 5e-6


NAMES = {
    "lamb_deepspeed": (None, False),
    "lamb_deepspeed_stage_0": (0, False),
    "lamb_deepspeed_stage_1": (1, False),
    "lamb_deepspeed_stage_2": (2, False),
    "lamb_deepspeed_stage_2_offload": (2, True),
    "lamb_deepspeed_stage_3": (3, False),
    "lamb_deepspeed_stage_3_offload": (3, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_knows_the_strategy_by_name(name, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from lightning.pytorch import Trainer

    from lightning_lamb.deepspeed import LambDeepSpeedStrategy

    strategy = Trainer(strategy=name, accelerator="cpu", logger=False).strategy
    assert isinstance(strategy, LambDeepSpeedStrategy)
    stage, offloaded = NAMES[name]
    zero = strategy.config["zero_optimization"]
    assert stage is None or zero["stage"] == stage
    assert ("offload_optimizer" in zero) == offloaded
