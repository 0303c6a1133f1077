"""A training in stages: what every step saw is what the plan said, to the step."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch, StagedWarmup
from lightning_lamb.batch_stages import BatchStage
from lightning_lamb.errors import BatchSizeError, ConflictError, InvalidOptionError, PlanError
from lightning_lamb.stages import Stage, learning_rate
from tests.lightning.staged_toys import STAGES, Noisy, Staged, StagedData, everything, train_staged
from tests.lightning.toys import Regression, quiet_trainer, regression_data

PLANNED_RATES = [0.01, 0.02, 0.01, 0.005, 0.005, 0.01, 0.01 / 3]
LIMITS: dict[str, Any] = {"limit_val_batches": 0}


def test_every_step_sees_the_planned_batch_data_and_learning_rate() -> None:
    module = Staged()
    stages = [{**STAGES[0], "global_batch_size": 4}, STAGES[1]]  # 4 and 4 of 20 samples: no window is short
    trainer = train_staged(module, stages=stages, **LIMITS)
    assert trainer.global_step == trainer.max_steps == 7
    assert [step["samples"] for step in module.steps] == [4] * 7
    assert [step["length"] for step in module.steps] == [3] * 4 + [5] * 3
    assert [step["lr"] for step in module.steps] == pytest.approx(PLANNED_RATES, rel=1e-12)


def test_the_schedule_is_the_plans_function_of_the_step() -> None:
    module = Staged()
    large_batch = LargeBatch(stages=STAGES)
    train_staged(module, large_batch=large_batch, **LIMITS)
    schedule = large_batch.plan.schedule()
    assert schedule == [Stage(4, 2, lr=0.02), Stage(3, 2, lr=0.01)]
    assert [step["lr"] for step in module.steps] == [learning_rate(schedule, t, 0.02) for t in range(7)]


def test_moments_and_step_count_go_on_through_a_switch() -> None:
    module = Staged()
    trainer = train_staged(module, **LIMITS)
    state = trainer.optimizers[0].state[module.net[0].weight]
    assert float(state["step"]) == 7  # bias correction knows that the moments are warm
    assert float(state["exp_avg"].abs().sum()) > 0


def test_no_gradient_is_counted_twice_at_a_switch() -> None:
    """Every window's gradient is that of its own samples: lr 0, so each can be computed by hand."""
    module = Staged()
    seen: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    class Keep(Staged):
        lamb_lr = 0.0

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.net[0].weight.grad is not None:
                gradients.append(self.net[0].weight.grad.clone())

    stages = [{**stage, "lr": 0.0} for stage in STAGES]
    module = Keep()
    train_staged(module, stages=stages, **LIMITS)
    sizes = [step["samples"] for step in module.steps]
    assert sizes == [8, 8, 4, 8, 4, 4, 4]  # 20 samples per epoch: the third window is short, the fourth in a new epoch
    fresh = Staged()
    for gradient in gradients:
        window: list[torch.Tensor] = []
        while sum(len(batch) for batch in window) < sizes[0]:
            window.append(seen.pop(0))
        sizes.pop(0)
        samples = torch.cat(window)
        fresh.zero_grad()
        fresh.training_step(samples, 0).backward()
        torch.testing.assert_close(gradient, fresh.net[0].weight.grad, rtol=1e-9, atol=1e-12)


def test_learning_rates_follow_the_square_root_rule_where_a_stage_gives_none() -> None:
    large_batch = LargeBatch(
        base_batch_size=4,
        base_lr=0.01,
        warmup_fraction=0.25,
        stages=[BatchStage(16, steps=4), {"global_batch_size": 4, "steps": 4, "shape": "constant"}],
    )
    module = Regression()
    trainer = quiet_trainer(callbacks=[large_batch], limit_val_batches=0)

    class Data(LightningDataModule):
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(regression_data(32), self.batch_size)

    trainer.fit(module, datamodule=Data())
    assert large_batch.plan.schedule() == [Stage(4, 4, lr=0.02), Stage(4, 1, lr=0.01, shape="constant")]


def test_without_a_base_the_optimizers_rate_is_the_first_stages() -> None:
    large_batch = LargeBatch(stages=[{"global_batch_size": 4, "steps": 1}, {"global_batch_size": 16, "steps": 1}])
    train_staged(Staged(), large_batch=large_batch, **LIMITS)
    assert [stage.scale for stage in large_batch.plan.schedule()] == [1.0, 2.0]


def test_shares_of_the_samples_become_steps() -> None:
    stages = [{"global_batch_size": 8, "share": 0.5}, {"global_batch_size": 4, "share": 0.5}]
    for length, options in (({"total_samples": 64}, {}), ({}, {"max_steps": 12})):
        large_batch = LargeBatch(stages=stages, **length)
        trainer = train_staged(Staged(), large_batch=large_batch, **LIMITS, **options)
        assert large_batch.plan.steps == [4, 8]
        assert trainer.global_step == 12


def test_a_batch_that_doubles_sees_equally_many_samples_at_one_learning_rate() -> None:
    large_batch = LargeBatch(4, doublings=2, total_samples=48, warmup_steps=2)
    module = Staged()
    train_staged(module, large_batch=large_batch, **LIMITS)
    assert large_batch.plan.steps == [4, 2, 1]
    assert [stage.global_batch_size for stage in large_batch.plan.stages] == [4, 8, 16]
    assert [step["lr"] for step in module.steps] == pytest.approx([0.01] + [0.02] * 6)


def test_the_papers_mixed_batch_recipe_is_two_stages() -> None:
    options = LargeBatch(recipe="bert-large-mixed", micro_batch_size=[64, 16]).stage_options
    first, second = options.stages
    assert (first.global_batch_size, first.steps, first.data) == (65536, 7037, {"sequence_length": 128})
    assert (second.global_batch_size, second.steps, second.data) == (32768, 1562, {"sequence_length": 512})
    assert (first.lr, second.lr) == pytest.approx((0.005 * math.sqrt(2), 0.005))
    assert [stage.warmup_steps for stage in options.plan(None).schedule()] == [2815, 312]
    assert options.micro_batch_sizes == (64, 16)
    scaled = LargeBatch(recipe="bert-large-mixed", global_batch_size=4096).stage_options
    assert [stage.global_batch_size for stage in scaled.stages] == [4096, 2048]


def test_a_waiting_schedule_takes_the_stages_and_any_other_is_refused() -> None:
    waiting = Staged()
    waiting.lamb_schedule = {}
    train_staged(waiting, **LIMITS)
    assert [step["lr"] for step in waiting.steps] == pytest.approx(PLANNED_RATES)
    other = Staged()
    other.lamb_schedule = {"warmup_steps": 3}
    with pytest.raises(ConflictError, match=r"LargeBatch has stages.*StagedWarmup"):
        train_staged(other, **LIMITS)


def test_the_window_loss_is_the_mean_over_the_window(tmp_path: Path) -> None:
    module = Staged()
    logger = CSVLogger(tmp_path)
    train_staged(module, logger=logger, log_every_n_steps=1, **LIMITS)
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines())
    logged = [float(row["train_loss_window"]) for row in rows]
    losses = [float(loss) for loss in module.losses]
    expected, start = [], 0
    for size in [4, 4, 2, 4, 4, 4, 4]:
        expected.append(sum(losses[start : start + size]) / size)
        start += size
    assert logged == pytest.approx(expected, rel=1e-5)


def test_the_window_loss_of_a_logging_step_is_not_shown_for_ever(tmp_path: Path) -> None:
    """What the last step of a stage logged stood in callback_metrics for all later steps."""

    class Watched(Staged):
        shown: list[float]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.shown.append(float(self.trainer.callback_metrics.get("train_loss_window", -1.0)))

    module = Watched()
    module.shown = []
    train_staged(module, logger=CSVLogger(tmp_path), log_every_n_steps=3, **LIMITS)
    losses = [float(loss) for loss in module.losses]
    ends = [4, 8, 10, 14, 18, 22, 26]
    expected = [sum(losses[begin:end]) / (end - begin) for begin, end in zip([0, *ends], ends)]
    assert [module.shown[end - 1] for end in ends] == pytest.approx(expected, rel=1e-5)


# ---- what is refused, before training


def refused(error: type[Exception], match: str, data: Any = None, **options: Any) -> None:
    module = Staged()
    with pytest.raises(error, match=match):
        train_staged(module, data or StagedData(), large_batch=LargeBatch(**options), **LIMITS)
    assert module.micro_batches == []


def test_stages_that_do_not_fit_the_trainer_show_the_plan() -> None:
    for limits, match in [
        ({"max_steps": 8}, r"max_steps=8.*add up to 7 optimizer steps \(-1\)(?s:.*)length=5"),
        ({"max_epochs": 3}, r"max_epochs=3.*stages say how long"),
    ]:
        with pytest.raises(PlanError, match=match):
            train_staged(Staged(), **LIMITS, **limits)


def test_a_stage_that_does_not_divide_names_the_nearest_batch() -> None:
    stages = [STAGES[0], {**STAGES[1], "global_batch_size": 9, "micro_batch_size": 2}]
    refused(BatchSizeError, r"stages\[1\]: global_batch_size=9.*8 or 10(?s:.*)in all 7 optimizer steps", stages=stages)


def test_a_later_stage_that_needs_more_samples_than_there_are_is_refused_at_once() -> None:
    """It was found when that stage began, hundreds of steps later."""
    stages = [{"steps": 100, "global_batch_size": 8}, {"steps": 2, "global_batch_size": 32}]
    refused(BatchSizeError, r"stages\[1\]: global_batch_size=32 needs 32.*epoch has 20(?s:.*)in all 102", stages=stages)
    for one, two in ((4, 2), (2, 8)):  # 20 samples are 10 or 3 of them
        changing = [{**stages[0], "micro_batch_size": one}, {**stages[1], "micro_batch_size": two}]
        refused(BatchSizeError, rf"stages\[1\]: .* needs {32 // two}", stages=changing)
    loader = DataLoader(Noisy(3, False), 2)
    with pytest.raises(BatchSizeError, match=r"micro-batches of \[2, 1\], but fit was given a DataLoader"):
        plain = [{name: value for name, value in stage.items() if name != "data"} for stage in STAGES]
        quiet_trainer(callbacks=[LargeBatch(stages=plain)]).fit(Staged(), loader)


def test_a_data_module_without_the_option_is_refused_with_what_it_has() -> None:
    stages = [STAGES[0], {**STAGES[1], "data": {"lenght": 5}}]
    refused(InvalidOptionError, r"stages\[1\]\.data: StagedData has no .*'lenght'.*batch_size, length", stages=stages)
    loader = DataLoader(Noisy(3, False), 2)
    with pytest.raises(InvalidOptionError, match="dataloader that was handed to fit"):
        quiet_trainer(callbacks=[LargeBatch(stages=STAGES)]).fit(Staged(), loader)


def test_sequences_that_the_model_cannot_take_are_refused() -> None:
    class Config:
        max_position_embeddings = 4

    class Encoder(nn.Module):
        config = Config()

    class Model(Staged):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder()

    class Sequences(StagedData):
        sequence_length = 1

    stages = [{**stage, "data": {"sequence_length": stage["data"]["length"]}} for stage in STAGES]
    with pytest.raises(InvalidOptionError, match=r"stages\[1\].*sequence_length=5, but encoder .*at most .*=4"):
        train_staged(Model(), Sequences(), stages=stages, **LIMITS)


def test_module_and_data_module_can_veto_a_stage() -> None:
    class Strict(StagedData):
        def check_stage(self, stage: BatchStage) -> None:
            if stage.data["length"] > 4:
                raise InvalidOptionError(f"length={stage.data['length']} is above 4.")

    refused(InvalidOptionError, "length=5 is above 4", Strict(), stages=STAGES)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"stages": []}, PlanError, "no stage"),
        ({"stages": [{"steps": 3}]}, InvalidOptionError, r"stages\[0\]: the key 'global_batch_size' is missing"),
        ({"stages": [{"steps": 3, "global_batch": 8}]}, InvalidOptionError, "Did you mean 'global_batch_size'"),
        ({"stages": [{"global_batch_size": 8}]}, InvalidOptionError, r"stages\[0\]: steps=None and share=None"),
        ({"stages": [{"global_batch_size": 8, "steps": 2, "warmup_steps": 3}]}, PlanError, "above the stage's steps=2"),
        ({"stages": [{"global_batch_size": 8, "share": 0.5}]}, PlanError, "add up to 0.5, not to 1"),
        ({"stages": [{"global_batch_size": 8, "share": 0.5}, STAGES[0]]}, PlanError, "some have steps"),
        (
            {"stages": [{"global_batch_size": 8, "steps": 1, "restarts_schedule": False}]},
            PlanError,
            "no schedule before",
        ),
        ({"stages": STAGES, "global_batch_size": 8}, InvalidOptionError, "each stage gives its own"),
        ({"stages": STAGES, "recipe": "bert-large-mixed"}, InvalidOptionError, "give one of them"),
        ({"stages": STAGES, "warmup_steps": 8}, InvalidOptionError, "warm-up of each stage"),
        ({"stages": STAGES, "micro_batch_size": [1, 2, 3]}, InvalidOptionError, "3 numbers for 2 stages"),
        ({"global_batch_size": 8, "total_samples": 100}, InvalidOptionError, "no effect without stages"),
        ({"global_batch_size": 8, "rewarm_steps": 100}, InvalidOptionError, "no effect without on_plan_change"),
    ],
)
def test_options_that_make_no_plan_are_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LargeBatch(**options)


# ---- a changed plan


def test_resuming_with_other_stages_shows_plan_and_difference(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    train_staged(Staged(), callbacks=[saver], enable_checkpointing=True, **LIMITS)
    checkpoint = tmp_path / "step=5.ckpt"
    changed = [STAGES[0], {**STAGES[1], "global_batch_size": 8, "lr": 0.03}]
    with pytest.raises(PlanError) as refusal:
        train_staged(Staged(), resume=checkpoint, stages=changed, **LIMITS)
    assert "stages[1].global_batch_size: 4 in the checkpoint, 8 now" in str(refusal.value)
    assert "stages[1].lr: 0.01 in the checkpoint, 0.03 now" in str(refusal.value)
    assert "in all 7 optimizer steps" in str(refusal.value)
    with pytest.raises(PlanError, match="stages: 2 in the checkpoint, none now"):
        train_staged(Staged(), resume=checkpoint, large_batch=LargeBatch(8), max_steps=7, **LIMITS)

    adopting = Staged()
    train_staged(adopting, resume=checkpoint, large_batch=LargeBatch(stages=changed, on_plan_change="adopt"), **LIMITS)
    assert [step["lr"] for step in adopting.steps] == pytest.approx([0.03, 0.01])


def test_rewarming_after_a_resume_with_another_batch(tmp_path: Path) -> None:
    """From zero, once: a second resume of the new run goes on in its schedule, bit for bit."""

    def run(resume: Path | None = None, callbacks: Any = (), batch: int = 4, **options: Any) -> Staged:
        module = Staged()
        large_batch = LargeBatch(batch, base_batch_size=4, base_lr=0.01, warmup_steps=2, **options)
        data = StagedData()
        data.length = 3
        saving = {"enable_checkpointing": True} if callbacks else {}
        train_staged(module, data, resume, list(callbacks), large_batch=large_batch, max_steps=9, **saving, **LIMITS)
        return module

    first, second = tmp_path / "first", tmp_path / "second"
    run(callbacks=[ModelCheckpoint(first, "{step}", save_top_k=-1, every_n_train_steps=1)])
    saver = ModelCheckpoint(second, "{step}", save_top_k=-1, every_n_train_steps=1)
    rewarmed = run(first / "step=3.ckpt", [saver], batch=16, on_plan_change="rewarm", rewarm_steps=3)
    peak = 0.02  # 0.01 * sqrt(16 / 4)
    assert [step["lr"] for step in rewarmed.steps] == pytest.approx(
        [peak / 3, peak * 2 / 3, peak, peak * 3 / 6, peak * 2 / 6, peak / 6]
    )
    again = run(second / "step=6.ckpt", batch=16, on_plan_change="rewarm", rewarm_steps=3)
    plain = run(second / "step=6.ckpt", batch=16)
    for resumed in (again, plain):
        assert resumed.steps == rewarmed.steps[3:]
        assert all(torch.equal(a, b) for a, b in zip(everything(resumed).values(), everything(rewarmed).values()))


def test_rewarming_needs_a_schedule_that_can(tmp_path: Path) -> None:
    data = StagedData()
    data.length = 3
    trainer = train_staged(Staged(), data, large_batch=LargeBatch(4), max_steps=2, **LIMITS)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    rewarming = LargeBatch(8, on_plan_change="rewarm", rewarm_steps=1)
    with pytest.raises(PlanError, match="needs a schedule that can warm up again"):
        train_staged(Staged(), data, tmp_path / "plain.ckpt", large_batch=rewarming, max_steps=4, **LIMITS)


# ---- another optimizer


def test_stages_on_an_optimizer_that_is_not_ours() -> None:
    module = Regression(lambda named: torch.optim.AdamW([p for _, p in named], lr=0.1))
    stages = [{"global_batch_size": 8, "steps": 2, "lr": 0.2}, {"global_batch_size": 4, "steps": 2, "lr": 0.1}]

    class Data(LightningDataModule):
        batch_size = 4

        def train_dataloader(self) -> DataLoader:
            return DataLoader(regression_data(32), self.batch_size)

    trainer = quiet_trainer(callbacks=[LargeBatch(stages=stages)])
    trainer.fit(module, datamodule=Data())
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, StagedWarmup)
    assert not isinstance(trainer.optimizers[0], Lamb)
    assert trainer.global_step == 4
