"""LargeBatch on one process: what it derives from the global batch, and what it refuses before training starts."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.distributed.fsdp import ShardingStrategy
from torch.optim import lr_scheduler as torch_schedulers
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch, StagedWarmup
from lightning_lamb.callbacks.learning_rate import multiply_learning_rates
from lightning_lamb.errors import BatchSizeError, ConflictError, InvalidOptionError, PlanError
from tests.lightning.toys import Batches, Endless, Recorder, Regression, quiet_trainer, regression_data


def fit(module: Regression, large_batch: LargeBatch, samples: int = 32, micro_batch: int = 4, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": [large_batch, Recorder()]} | options))
    trainer.fit(module, datamodule=Batches(regression_data(samples), micro_batch))
    return trainer


# ---- accumulation


def test_accumulation_comes_from_the_global_batch() -> None:
    large_batch = LargeBatch(16)
    trainer = fit(Regression(), large_batch)
    assert trainer.accumulate_grad_batches == 4
    assert trainer.global_step == 2
    assert (large_batch.derived.micro_batch_size, large_batch.derived.data_parallel_size) == (4, 1)


class InHparams(Batches):
    def __init__(self, batch_size: int) -> None:
        super().__init__(regression_data(32), batch_size)
        self.save_hyperparameters()
        del self.batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.hparams.batch_size)


class MakesItsOwnData(Regression):
    batch_size: int

    def setup(self, stage: str) -> None:
        self.train_set = regression_data(32)  # not there before setup: LargeBatch must not ask earlier

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set, 4)


def test_the_micro_batch_is_read_wherever_it_is_declared() -> None:
    loader = DataLoader(regression_data(32), 4)
    sampler_loader = DataLoader(
        regression_data(32),
        batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(range(32)), 4, False),
    )
    for module, data in [
        (Regression(), {"datamodule": InHparams(4)}),
        (Regression(), {"train_dataloaders": loader}),
        (Regression(), {"train_dataloaders": sampler_loader}),
        (MakesItsOwnData(), {}),
    ]:
        trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16)])
        trainer.fit(module, **data)
        assert trainer.accumulate_grad_batches == 4, data
        assert trainer.global_step == 2


def test_a_second_fit_of_the_same_trainer_derives_again() -> None:
    large_batch = LargeBatch(16)
    trainer = fit(Regression(), large_batch)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Regression(), datamodule=Batches(regression_data(32), 8))
    assert trainer.accumulate_grad_batches == 2


def test_a_global_batch_that_does_not_divide_names_the_nearest() -> None:
    with pytest.raises(BatchSizeError, match=r"global_batch_size=18.*16 or 20"):
        fit(Regression(), LargeBatch(18))


def test_a_micro_batch_that_nothing_tells_is_asked_for() -> None:
    loader = DataLoader(regression_data(4), batch_size=None)
    with pytest.raises(BatchSizeError, match=r"without a batch_size.*micro_batch_size="):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16)]).fit(Regression(), loader)


def test_an_accumulation_longer_than_the_epoch_is_refused() -> None:
    with pytest.raises(BatchSizeError, match=r"global_batch_size=64 needs 16 micro-batches.*epoch has 8.*at most 32"):
        fit(Regression(), LargeBatch(64))


def test_fast_dev_run_works_whatever_the_batch() -> None:
    trainer = fit(Regression(), LargeBatch(64, warmup_steps=100), fast_dev_run=True)
    assert trainer.global_step == 1


# ---- learning rate


def rates_of(**options: Any) -> list[float]:
    module = Regression(lambda named: Lamb(named, lr=0.02))
    fit(module, LargeBatch(16, **options))
    return module.rates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.02),
        ({"base_batch_size": 4}, 0.04),
        ({"base_batch_size": 4, "lr_scaling": "linear"}, 0.08),
        ({"base_batch_size": 4, "lr_scaling": "none"}, 0.02),
        ({"base_batch_size": 4, "base_lr": 0.1}, 0.2),
        ({"base_lr": 0.1, "lr_scaling": "none"}, 0.1),
    ],
)
def test_the_learning_rate_follows_the_batch_once(options: dict[str, Any], expected: float) -> None:
    assert rates_of(**options) == [pytest.approx(expected)] * 2


def test_groups_keep_their_ratio_and_tensor_rates_stay_tensors() -> None:
    def two_groups(named: list) -> Lamb:
        return Lamb([{"params": named[:2], "lr": torch.tensor(0.1)}, {"params": named[2:]}], lr=torch.tensor(0.2))

    module = Regression(two_groups)
    trainer = fit(module, LargeBatch(16, base_batch_size=4, base_lr=0.3))
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)
    assert [float(rate) for rate in rates] == pytest.approx([0.3, 0.6])


@pytest.mark.parametrize(
    "make",
    [
        lambda o, f: StagedWarmup(o, total_steps=20, warmup_steps=5),
        lambda o, f: torch_schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o, f: torch_schedulers.MultiplicativeLR(o, lambda t: 0.9),
        lambda o, f: torch_schedulers.StepLR(o, 3),
        lambda o, f: torch_schedulers.LinearLR(o, 0.1, total_iters=6),
        lambda o, f: torch_schedulers.PolynomialLR(o, 10),
        lambda o, f: torch_schedulers.ExponentialLR(o, 0.9),
        lambda o, f: torch_schedulers.CosineAnnealingLR(o, 10),
        lambda o, f: torch_schedulers.CosineAnnealingWarmRestarts(o, 5),
        lambda o, f: torch_schedulers.OneCycleLR(o, max_lr=0.1 * f, total_steps=21),
        lambda o, f: torch_schedulers.CyclicLR(o, 0.01 * f, 0.1 * f, step_size_up=4, cycle_momentum=False),
        lambda o, f: torch_schedulers.SequentialLR(
            o, [torch_schedulers.LinearLR(o, 0.1, total_iters=5), torch_schedulers.CosineAnnealingLR(o, 10)], [5]
        ),
        lambda o, f: torch_schedulers.ChainedScheduler(
            [torch_schedulers.LinearLR(o, 0.1, total_iters=5), torch_schedulers.ExponentialLR(o, 0.9)]
        ),
    ],
)
def test_scaling_afterwards_is_as_if_made_with_the_scaled_rate(make: Any) -> None:
    factor = 4.0
    trajectories = []
    for made_with, afterwards in ((factor, 1.0), (1.0, factor)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1 * made_with)
        scheduler = make(optimizer, made_with)
        multiply_learning_rates(optimizer, [scheduler], [afterwards])
        trajectory = []
        for _ in range(20):
            trajectory.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        trajectories.append(trajectory)
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-12, abs=1e-15)


# ---- schedule


def test_a_warm_up_adds_a_schedule_counted_in_optimizer_steps() -> None:
    module = Regression()
    trainer = fit(module, LargeBatch(8, warmup_steps=2), max_epochs=2)
    assert module.rates == pytest.approx([0.01, 0.02] + [0.02 * (1 - t / 8) for t in range(2, 8)])
    assert trainer.lr_scheduler_configs[0].interval == "step"


def test_the_warm_up_fraction_grows_with_the_batch() -> None:
    large_batch = LargeBatch(8, base_batch_size=4, warmup_fraction=0.125)
    fit(Regression(), large_batch, max_epochs=2)
    assert (large_batch.derived.warmup_steps, large_batch.derived.total_steps) == (2, 8)


@pytest.mark.parametrize(
    ("limits", "total"),
    [({"max_epochs": 3}, 12), ({"max_epochs": -1, "max_steps": 5}, 5), ({"max_epochs": 3, "max_steps": 7}, 7)],
)
def test_a_waiting_schedule_gets_the_trainers_length(limits: dict[str, int], total: int) -> None:
    module = Regression(scheduler=lambda optimizer: StagedWarmup(optimizer, warmup_fraction=0.25))
    trainer = fit(module, LargeBatch(8), **limits)
    assert trainer.lr_scheduler_configs[0].scheduler.total_steps == total == len(module.rates)


def test_large_batchs_warm_up_goes_into_a_schedule_that_has_none() -> None:
    module = Regression(scheduler=lambda optimizer: StagedWarmup(optimizer, shape="constant"))
    fit(module, LargeBatch(8, warmup_steps=2))
    assert module.rates == pytest.approx([0.01, 0.02, 0.02, 0.02])


def test_two_warm_ups_are_refused() -> None:
    module = Regression(scheduler=lambda optimizer: StagedWarmup(optimizer, warmup_steps=1))
    with pytest.raises(ConflictError, match="both set the schedule"):
        fit(module, LargeBatch(8, warmup_steps=2))


def test_a_warm_up_before_a_foreign_schedule_is_refused() -> None:
    module = Regression(scheduler=lambda optimizer: torch_schedulers.StepLR(optimizer, 3))
    with pytest.raises(ConflictError, match="schedule is StepLR"):
        fit(module, LargeBatch(8, warmup_steps=2))


def test_a_warm_up_above_the_total_is_refused() -> None:
    with pytest.raises(PlanError, match=r"warmup_steps=5 is above the 4 optimizer steps"):
        fit(Regression(), LargeBatch(8, warmup_steps=5))
    with pytest.raises(PlanError, match=r"warmup_fraction=0.5 at batch 4 becomes 2"):
        LargeBatch(16, base_batch_size=4, warmup_fraction=0.5)


def test_a_dataset_without_a_length_needs_max_steps() -> None:
    def train(**limits: int) -> Any:
        trainer = quiet_trainer(callbacks=[LargeBatch(8, warmup_steps=1)], **limits)
        trainer.fit(Regression(), DataLoader(Endless(), 4))
        return trainer

    with pytest.raises(PlanError, match=r"no length.*max_steps"):
        train(max_epochs=2)
    assert train(max_steps=3).global_step == 3
    with pytest.raises(PlanError, match="trains without end"):
        train(max_epochs=-1)


# ---- recipe


def test_a_recipe_gives_what_is_left_out() -> None:
    large_batch = LargeBatch(recipe="mnist-lenet", global_batch_size=16, base_batch_size=16, warmup_steps=1)
    module = Regression()
    fit(module, large_batch)
    assert large_batch.rules.base_lr == 0.01
    assert max(module.rates) == pytest.approx(0.01)
    assert LargeBatch(recipe="resnet50").rules.global_batch_size == 32768


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"recipe='bert'.*bert-large"):
        LargeBatch(recipe="bert")


# ---- conflicts and options


def test_everything_else_that_sets_the_accumulation_is_refused() -> None:
    with pytest.raises(ConflictError, match="GradientAccumulationScheduler"):
        fit(Regression(), LargeBatch(8), callbacks=[LargeBatch(8), GradientAccumulationScheduler({0: 2})])
    with pytest.raises(ConflictError, match="StochasticWeightAveraging"):
        fit(Regression(), LargeBatch(8), callbacks=[LargeBatch(8), StochasticWeightAveraging(0.1)])
    with pytest.raises(ConflictError, match=r"accumulate_grad_batches=2"):
        fit(Regression(), LargeBatch(8), accumulate_grad_batches=2)


def test_a_trainer_that_trains_on_nothing_is_refused() -> None:
    """It was told that its dataset has no length."""
    with pytest.raises(ConflictError, match=r"limit_train_batches=0\) trains on nothing"):
        fit(Regression(), LargeBatch(8, warmup_steps=1), limit_train_batches=0)


def test_manual_optimization_is_refused() -> None:
    module = Regression()
    module.automatic_optimization = False
    with pytest.raises(ConflictError, match=r"Regression.automatic_optimization is False"):
        fit(module, LargeBatch(8))


@pytest.mark.parametrize(
    ("option", "trainer_option"),
    [({"max_grad_norm": 1.0}, {}), ({"max_grad_value": 1.0}, {"gradient_clip_algorithm": "value"})],
)
def test_double_clipping_is_refused(option: dict[str, float], trainer_option: dict[str, str]) -> None:
    module = Regression(lambda named: Lamb(named, lr=0.02, **option))
    with pytest.raises(ConflictError, match="clipped twice"):
        fit(module, LargeBatch(8), gradient_clip_val=0.5, **trainer_option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "global_batch_size"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"global_batch_size": 8, "base_batch_size": -1}, "base_batch_size=-1"),
        ({"global_batch_size": 8, "base_lr": 0.1}, "at which batch"),
        ({"global_batch_size": 8, "base_batch_size": 8, "base_lr": math.nan}, "base_lr=nan"),
        ({"global_batch_size": 8, "warmup_fraction": 1.5}, "warmup_fraction=1.5"),
        ({"global_batch_size": 8, "warmup_fraction": 0.1, "warmup_steps": 3}, "both set the warm-up"),
        ({"global_batch_size": 8, "warmup_steps": -3}, "warmup_steps=-3"),
        ({"global_batch_size": 8, "lr_scaling": "squrt"}, "sqrt"),
        ({"global_batch_size": 8, "micro_batch_size": 0}, "micro_batch_size=0"),
        ({"global_batch_size": 8, "loss_reduction": "none"}, "loss_reduction='none'"),
        ({"global_batch_size": 8, "scheduler_interval": "batch"}, "scheduler_interval='batch'"),
        ({"global_batch_size": 8, "on_plan_change": "ignore"}, "on_plan_change='ignore'"),
    ],
)
def test_an_option_out_of_range_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        LargeBatch(**options)


@pytest.mark.parametrize("trains", [True, False])
def test_resume_where_torch_restores_wrong_moments_is_refused_under_lightnings_own_strategy(trains: bool) -> None:
    """FSDPStrategy runs on GPUs only; CPUFSDPStrategy refuses by itself."""
    hybrid = SimpleNamespace(sharding_strategy=ShardingStrategy.HYBRID_SHARD, _state_dict_type="sharded")
    trainer: Any = SimpleNamespace(training=trains, strategy=hybrid)
    with pytest.raises(ConflictError, match=r"HYBRID_SHARD.*FULL_SHARD") if trains else nullcontext():
        LargeBatch(8).on_load_checkpoint(trainer, Regression(), {})


def test_one_summary_says_what_was_derived(caplog: pytest.LogCaptureFixture) -> None:
    # rank_zero_info logs through whichever of the two packages was imported last.
    for name in ("lightning.pytorch.utilities.rank_zero", "pytorch_lightning.utilities.rank_zero"):
        caplog.set_level(logging.INFO, logger=name)
    fit(Regression(), LargeBatch(16, base_batch_size=4, warmup_fraction=0.125))
    (summary,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("LargeBatch")]
    assert "16 samples = micro-batch 4 x 1 rank x 4 accumulated" in summary
    assert "0.04 (the optimizer's x sqrt(16 / 4))" in summary
    assert "1 optimizer steps (50.0%)" in summary
