"""`python -m lightning_lamb plan` and LargeBatch announce the same numbers, whatever they are asked."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from lightning_lamb import LargeBatch, make_plan, plan_from_recipe
from lightning_lamb.callbacks import present_batch
from lightning_lamb.lightning_seams import total_optimizer_steps
from lightning_lamb.plan import Plan
from lightning_lamb.stages import Stage, learning_rate
from tests.lightning.toys import Recorder, Regression, quiet_trainer, regression_data

LR = 0.1
KINDS = ("one batch, by steps", "one batch, by epochs", "stages of steps", "stages of shares", "doublings", "recipe")


class Enough(Exception):
    """Everything has been announced; training need not begin."""


class StopBeforeTraining(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise Enough


class Data(LightningDataModule):
    sequence_length = 1  # for the recipe

    def __init__(self, samples: int, batch_size: int) -> None:
        super().__init__()
        self.dataset, self.batch_size = regression_data(samples), batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)


def fit(large_batch: LargeBatch, samples: int, micro: int, callback: Callback, **limits: Any) -> Any:
    module = Regression(lambda named: torch.optim.SGD([p for _, p in named], lr=LR))
    trainer = quiet_trainer(callbacks=[large_batch, callback], **limits)
    try:
        trainer.fit(module, datamodule=Data(samples, micro))
    except Enough:
        trainer.accumulate = trainer.accumulate_grad_batches
    return trainer, module


def random_rules(draw: random.Random, batch: int, *, steps: int) -> dict[str, Any]:
    """How the learning rate and the warm-up follow the batch."""
    rules: dict[str, Any] = {"lr_scaling": draw.choice(["sqrt", "linear", "none"])}
    if draw.random() < 0.7:
        rules["base_batch_size"] = max(1, batch // draw.choice([1, 2, 3, 4]))
        if draw.random() < 0.6:
            rules["base_lr"] = draw.choice([1e-3, 0.02, 0.3])
    if draw.random() < 0.5:
        share = rules.get("base_batch_size", batch) / batch
        rules["warmup_fraction"] = draw.choice([0.01, 0.07, 0.1, 0.2]) * share
    elif draw.random() < 0.5 and steps:
        rules["warmup_steps"] = draw.randint(0, steps)
    return rules


def random_stages(draw: random.Random, window: int, *, shares: bool) -> list[dict[str, Any]]:
    number = draw.randint(1, 4)
    weights = [draw.randint(1, 9) for _ in range(number)]
    stages: list[dict[str, Any]] = []
    for index, weight in enumerate(weights):
        stage: dict[str, Any] = {"global_batch_size": window * draw.randint(1, 6)}
        stage |= {"share": weight / sum(weights)} if shares else {"steps": draw.randint(1, 40)}
        if index and draw.random() < 0.4:
            stage["restarts_schedule"] = False
        else:
            stage |= draw.choice([{}, {"lr": 0.05}, {"shape": "cosine", "end": 0.1}, {"power": 2.0}])
            stage |= draw.choice([{}, {"warmup_fraction": 0.3}, {"warmup_steps": 1}])
        stages.append(stage)
    return stages


def random_input(seed: int) -> tuple[str, Plan, LargeBatch, dict[str, Any], int]:
    """A plan from the command line's functions, and a LargeBatch that was told the same."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    micro, ranks, accumulate = draw.randint(1, 6), draw.choice([1, 2, 3, 8]), draw.randint(1, 5)
    limits: dict[str, Any] = {"max_epochs": -1}
    if kind == "one batch, by epochs":
        ranks = 1
    window = micro * ranks
    batch = window * accumulate
    common: dict[str, Any] = {"micro_batch_size": micro, "data_parallel_size": ranks}
    samples = 400
    if kind == "recipe":
        recipe, first = "bert-large-mixed", 2 * window * draw.choice([2, 5, 9])
        given = draw.choice([{}, {"base_lr": 0.01, "base_batch_size": first // 2}, {"warmup_fraction": 0.1}])
        if "warmup_fraction" in given:
            given = {**given, "base_batch_size": first}
        plan = plan_from_recipe(recipe, global_batch_size=first, **given, **common)
        return (
            kind,
            plan,
            LargeBatch(recipe=recipe, global_batch_size=first, micro_batch_size=micro, **given),
            {},
            ranks,
        )
    if kind.startswith("stages"):
        shares = kind == "stages of shares"
        stages = random_stages(draw, window, shares=shares)
        rules = random_rules(draw, min(stage["global_batch_size"] for stage in stages), steps=0)
        rules["warmup_fraction"] = draw.choice([0.0, 0.04])
        length: dict[str, Any] = {}
        told: dict[str, Any] = {}
        if shares and draw.random() < 0.5:
            told["max_steps"] = length["total_steps"] = draw.randint(60, 300)
        elif shares:
            total = draw.randint(2_000, 50_000) * max(stage["global_batch_size"] for stage in stages)
            length, told = {"dataset_size": total, "epochs": 1}, {"total_samples": total}
        planned = make_plan(**common, **length, **({"base_lr": LR} | rules), stages=stages)
        limits = {name: told.pop(name) for name in ("max_steps",) if name in told}
        return kind, planned, LargeBatch(stages=stages, micro_batch_size=micro, **rules, **told), limits, ranks
    steps = draw.randint(20, 200)
    rules = random_rules(draw, batch, steps=steps // 20)
    common |= {"global_batch_size": batch} | {"base_lr": LR} | rules
    if kind == "doublings":
        doublings = draw.randint(1, 3)
        total = (doublings + 1) * 2**doublings * batch * draw.randint(3, 50) + draw.randint(0, batch)
        common["warmup_fraction"] = rules.pop("warmup_fraction", 0.0) / 8
        if "warmup_steps" not in rules:
            rules["warmup_fraction"] = common["warmup_fraction"]
        plan = make_plan(**common, doublings=doublings, dataset_size=total, epochs=1)
        large_batch = LargeBatch(batch, doublings=doublings, total_samples=total, micro_batch_size=micro, **rules)
        return kind, plan, large_batch, {}, ranks
    if kind == "one batch, by epochs":
        samples, epochs = draw.randint(batch, 12 * batch), draw.randint(1, 7)
        steps = -(-samples // batch) * epochs
        if rules.get("warmup_steps", 0) > steps:
            common["warmup_steps"] = rules["warmup_steps"] = steps
        plan = make_plan(**common, dataset_size=samples, epochs=epochs, last_window="keep")
        return kind, plan, LargeBatch(batch, micro_batch_size=micro, **rules), {"max_epochs": epochs, "n": samples}, 1
    plan = make_plan(**common, total_steps=steps)
    return kind, plan, LargeBatch(batch, micro_batch_size=micro, **rules), limits | {"max_steps": steps}, ranks


def announced_schedule(large_batch: LargeBatch, trainer: Any) -> list[Stage]:
    """What LargeBatch says, as absolute learning rates."""
    if large_batch.plan is not None:
        stages = large_batch.plan.schedule()
    else:
        derived = large_batch.derived
        total = derived.total_steps or total_optimizer_steps(trainer)
        stages = [Stage(total, derived.warmup_steps or 0, lr=derived.learning_rates[0])]
    return [
        stage if stage.lr is not None else Stage(**{**vars(stage), "lr": LR * stage.scale, "scale": 1.0})
        for stage in stages
    ]


def test_200_random_trainings_are_planned_and_announced_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan --doublings 2` said 334, 167 and 84 steps with a warm-up of 50, LargeBatch 333, 167 and 83 with 29."""
    compared = Counter()
    for seed in range(200):
        kind, plan, large_batch, limits, ranks = random_input(seed)
        monkeypatch.setattr(present_batch, "data_parallel_size", lambda trainer, ranks=ranks: ranks)
        micro = plan.stages[0].micro_batch_size
        trainer, _ = fit(large_batch, limits.pop("n", 200), micro, StopBeforeTraining(), fast_dev_run=False, **limits)
        said = announced_schedule(large_batch, trainer)
        assert [(stage.steps, stage.warmup_steps) for stage in said] == [
            (stage.steps, stage.warmup_steps) for stage in plan.schedule
        ], (seed, kind)
        assert [stage.lr for stage in said] == pytest.approx([stage.lr for stage in plan.schedule], rel=1e-12), seed
        if large_batch.plan is not None:
            assert said == [Stage(**{**vars(stage), "lr": said[i].lr}) for i, stage in enumerate(plan.schedule)], seed
            assert large_batch.plan.steps == [stage.total_steps for stage in plan.stages]
            assert [stage.restarts_schedule for stage in large_batch.plan.stages] == [
                stage.restarts_schedule for stage in plan.stages
            ]
        batches = [large_batch.derived] if large_batch.plan is None else large_batch._batch.batches
        assert [(b.global_batch_size, b.accumulate_grad_batches) for b in batches] == [
            (stage.global_batch_size, stage.accumulate_grad_batches) for stage in plan.stages
        ], (seed, kind)
        compared[kind] += 1
    assert set(compared) == set(KINDS) and sum(compared.values()) == 200


@pytest.mark.parametrize("seed", [1, 7, 13])
def test_short_last_windows_are_steps_and_the_planned_rates_train(seed: int) -> None:
    _, plan, large_batch, limits, _ = random_input(seed)
    samples = limits.pop("n")
    trainer, module = fit(large_batch, samples, plan.stages[0].micro_batch_size, Recorder(), **limits)
    assert trainer.global_step == plan.total_steps
    if large_batch.derived.warmup_steps is not None:
        expected = [learning_rate(plan.schedule, step, LR) for step in range(plan.total_steps)]
        assert module.rates == pytest.approx(expected, rel=1e-12)
