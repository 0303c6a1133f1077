"""Precision plugins, optimizers, who makes the optimizer, options of the Trainer, and LargeBatch's own plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_lamb import Lamb, Lars
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.lightning.composition.cell import (
    RATE,
    Cell,
    ModuleFeature,
    OptimizerFeature,
    PlanFeature,
    PrecisionFeature,
    SchedulerFeature,
    TrainerFeature,
)


def scaled(first: float) -> Any:
    """fp16 on a CPU with a GradScaler that begins at this scale."""

    def options() -> dict[str, Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=first, growth_interval=1000)
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}

    return options


PRECISIONS = [
    PrecisionFeature("32-true", lambda: {"precision": "32-true"}),
    PrecisionFeature("64-true", lambda: {"precision": "64-true"}, tolerance=1e-12),
    PrecisionFeature("bf16-mixed", lambda: {"precision": "bf16-mixed"}, tolerance=3e-2),
    PrecisionFeature("bf16-true", lambda: {"precision": "bf16-true"}, tolerance=6e-2),
    PrecisionFeature("16-mixed, GradScaler", scaled(1024.0), tolerance=3e-2),
    PrecisionFeature(
        "16-mixed, GradScaler, skipped steps",
        scaled(2.0**20),
        tolerance=3e-2,
        skipped=1,
        remark="a skipped step moves StagedWarmup and stages as little as the weights; other schedules as in Lightning",
    ),
]


def bare(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of tensors, for optimizers that take no names."""
    return [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]


OPTIMIZERS = [
    OptimizerFeature("Lamb", lambda groups: Lamb(groups, lr=RATE), cli="lightning_lamb.Lamb"),
    OptimizerFeature("Lamb, `fused=True`", lambda groups: Lamb(groups, lr=RATE, fused=True)),
    OptimizerFeature("Lamb, `foreach=True`", lambda groups: Lamb(groups, lr=RATE, foreach=True)),
    OptimizerFeature("Lars", lambda groups: Lars(groups, lr=RATE), cli="lightning_lamb.Lars"),
    OptimizerFeature("AdamW", lambda groups: torch.optim.AdamW(bare(groups), lr=RATE), cli="torch.optim.AdamW"),
    OptimizerFeature("SGD", lambda groups: torch.optim.SGD(bare(groups), lr=RATE), cli="torch.optim.SGD"),
    OptimizerFeature("ShardedStateOptimizer", lambda groups: ShardedStateOptimizer(groups, Lamb, lr=RATE), ranks=(2,)),
    OptimizerFeature(
        "torch's ZeroRedundancyOptimizer",
        lambda groups: ZeroRedundancyOptimizer(bare(groups), torch.optim.AdamW, lr=RATE),
        ranks=(2,),
    ),
    OptimizerFeature("a learning rate that is a tensor", lambda groups: with_tensor_rates(groups)),
    OptimizerFeature(
        "LBFGS",
        lambda groups: torch.optim.LBFGS([p for g in bare(groups) for p in g["params"]], lr=RATE),
        refused="LBFGS",
        remark="it calls the closure several times in a step",
    ),
]


def with_tensor_rates(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Every group's rate in a tensor of its own."""
    return Lamb([{**group, "lr": torch.tensor(group["lr"])} for group in groups], lr=torch.tensor(RATE))


MODULES = [
    ModuleFeature("`configure_optimizers` of one's own", builder="own"),
    ModuleFeature("LambMixin", builder="mixin"),
    ModuleFeature("stock LightningCLI", builder="stock_cli"),
    ModuleFeature("LambCLI", builder="lamb_cli"),
    ModuleFeature("manual optimization", builder="manual", refused="automatic_optimization"),
]

TRAINER = [
    TrainerFeature("`max_steps`", trainer={"max_steps": 7, "max_epochs": -1}, steps=7),
    TrainerFeature("`max_steps` and `max_epochs`", trainer={"max_steps": 7, "max_epochs": 9}, steps=7),
    TrainerFeature("`limit_train_batches=10`", trainer={"limit_train_batches": 10}, cut=lambda sizes: sizes[:10]),
    TrainerFeature(
        "`limit_train_batches=0.5`",
        trainer={"limit_train_batches": 0.5},
        cut=lambda sizes: sizes[: len(sizes) // 2],
    ),
    TrainerFeature("`overfit_batches=8`", trainer={"overfit_batches": 8}, cut=lambda sizes: sizes[:8]),
    TrainerFeature("`fast_dev_run=True`", trainer={"fast_dev_run": True}, cut=lambda sizes: sizes[:1], epochs=1),
    TrainerFeature("`gradient_clip_val=0.1`", trainer={"gradient_clip_val": 0.1}),
    TrainerFeature("`val_check_interval=3`", trainer={"val_check_interval": 3}),
    TrainerFeature("`check_val_every_n_epoch=2`", trainer={"check_val_every_n_epoch": 2}),
    TrainerFeature("`num_sanity_val_steps=1`", trainer={"num_sanity_val_steps": 1}),
    TrainerFeature("`barebones=True`", trainer={"barebones": True}),
    TrainerFeature(
        "`accumulate_grad_batches=2`", trainer={"accumulate_grad_batches": 2}, refused="accumulate_grad_batches=2"
    ),
    TrainerFeature(
        "`limit_train_batches=3`: less than a window",
        trainer={"limit_train_batches": 3},
        refused="needs 4 micro-batches",
        ranks=(1,),
    ),
]


def ramp(steps: int) -> Any:
    """The warm-up that LargeBatch adds, and its straight line to 0."""
    return lambda total: [(t + 1) / steps if t < steps else 1 - t / total for t in range(total)]


def of_stages(total: int) -> list[float]:
    """Rates of the two stages below, as multiples of 0.01."""
    return [1 / 2, 1, 1 - 2 / 4, 1 - 3 / 4, 0.5, 0.5, 0.5]


PLANS = [
    PlanFeature("learning rate only"),
    PlanFeature("`warmup_steps=3`", large_batch={"warmup_steps": 3}, rates=ramp(3)),
    PlanFeature(
        "`warmup_fraction=0.05` at the base batch",
        large_batch={"warmup_fraction": 0.05},
        rates=ramp(3),
        remark="four times the share at four times the batch: 3 of 15 steps",
    ),
    PlanFeature(
        "`base_lr`, linear scaling",
        large_batch={"base_lr": 0.005, "lr_scaling": "linear"},
        remark="0.005 x 8 / 2 is twice the optimizer's rate",
    ),
    PlanFeature(
        "stages",
        trainer={"max_epochs": None},
        large_batch={
            "global_batch_size": None,
            "base_batch_size": None,
            "stages": [
                {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "warmup_steps": 2, "lr": 0.01},
                {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "lr": 0.005, "shape": "constant"},
            ],
        },
        rates=of_stages,
        batches=((4, 8), (3, 4)),
    ),
]

STEP_DECAY = SchedulerFeature(
    "StepLR", lambda o, f, n: torch.optim.lr_scheduler.StepLR(o, 2), config={"interval": "step"}
)
TWICE = [
    Cell((STEP_DECAY, dataclasses.replace(plan, name=f"{plan.name} beside StepLR", refused=message)))
    for plan, message in ((PLANS[1], "StepLR"), (PLANS[2], "StepLR"), (PLANS[4], "StepLR"))
] + [
    Cell(
        (
            OptimizerFeature("`max_grad_norm` in Lamb", lambda groups: Lamb(groups, lr=RATE, max_grad_norm=1.0)),
            TrainerFeature(
                "`gradient_clip_val` beside `max_grad_norm`",
                trainer={"gradient_clip_val": 0.1},
                refused="clipped twice",
            ),
        )
    ),
]
"""Two features that would do the same thing; the second is the one that is refused."""
