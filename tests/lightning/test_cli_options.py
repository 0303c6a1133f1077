"""What is said on LambCLI's command line is done, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_lamb import LambMixin, Lars
from lightning_lamb.errors import ConflictError, InvalidOptionError
from tests.lightning.test_cli import Model, cli, optimizer_of, own_command_line  # noqa: F401 - a fixture

BESIDE_LARGE_BATCH = [
    "--trainer.callbacks+=lightning_lamb.LargeBatch",
    "--trainer.callbacks.global_batch_size=8",
]
EXPONENTIAL = ["--optimizer=Lamb", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"]


@pytest.mark.parametrize(
    ("asked", "said", "interval"), [(None, "epoch", "epoch"), ("epoch", "epoch", "epoch"), (None, None, "step")]
)
def test_lr_interval_and_large_batchs_scheduler_interval_mean_the_same(asked: Any, said: Any, interval: str) -> None:
    arguments = [*EXPONENTIAL, *BESIDE_LARGE_BATCH]
    arguments += [f"--lr_interval={asked}"] if asked else []
    arguments += [f"--trainer.callbacks.scheduler_interval={said}"] if said else []
    assert cli(*arguments).trainer.lr_scheduler_configs[0].interval == interval


def test_two_intervals_that_differ_are_refused() -> None:
    with pytest.raises(ConflictError, match=r"--lr_interval epoch and LargeBatch\(scheduler_interval='step'\) differ"):
        cli(*EXPONENTIAL, "--lr_interval=epoch", *BESIDE_LARGE_BATCH, "--trainer.callbacks.scheduler_interval=step")


def test_a_staged_warmup_per_epoch_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"--lr_interval epoch with StagedWarmup"):
        cli("--optimizer=Lamb", "--lr_scheduler=StagedWarmup", "--lr_interval=epoch")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lr_scheduler=StagedWarmup"],
        ["--param_groups.no_decay_names=['net.3']"],
        ["--shard_optimizer_state=true"],
        ["--lr_interval=epoch"],
    ],
)
def test_options_of_an_optimizer_without_one_are_refused(arguments: list[str]) -> None:
    """The module's own optimizer trained without the schedule that was asked for, and without a word."""
    name = arguments[0].split("=")[0].split(".")[0]
    with pytest.raises(InvalidOptionError, match=f"{name} without --optimizer"):
        cli(*arguments)


def test_an_interval_without_a_scheduler_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match="--lr_interval step without --lr_scheduler"):
        cli("--optimizer=Lamb", "--lr_interval=step")


@pytest.mark.parametrize(
    ("options", "ratios"),
    [
        (["--optimizer.adapt=false"], set()),
        (["--optimizer.exempt_1d=false"], {"net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.3.bias"}),
        (["--optimizer.adapt=decayed", "--optimizer.weight_decay=0.0"], set()),
    ],
)
def test_options_of_the_optimizer_hold_beside_group_rules(options: list[str], ratios: set[str]) -> None:
    """The groups that the rules made said ``adapt`` and ``exempt_1d`` themselves."""
    optimizer = optimizer_of("--optimizer=Lamb", *options, "--param_groups.no_adapt_names=['net.3.weight']")
    assert set(optimizer.trust_ratios) == ratios


def test_a_presets_own_decay_holds_beside_group_rules() -> None:
    preset = "--optimizer=lightning_lamb.presets.tfa_lamb"
    optimizer = optimizer_of(preset, "--param_groups.no_adapt_names=['net.3']")
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    assert "net.0.bias" in optimizer.trust_ratios


def test_an_option_that_contradicts_the_group_rules_is_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"exempt_1d=False.*no_decay_1d=True"):
        optimizer_of("--optimizer=Lamb", "--optimizer.exempt_1d=false", "--param_groups.no_decay_1d=true")


class Mixed(LambMixin, Model):
    """Its own learning rate is not the command line's."""

    lamb_lr = 0.5


def test_the_command_line_replaces_the_mixins_optimizer_and_says_so() -> None:
    with pytest.warns(UserWarning, match="lamb_lr of Mixed have no effect"):
        made = cli("--optimizer=Lars", "--optimizer.lr=0.125", model=Mixed)
    assert type(made.trainer.optimizers[0]) is Lars
    assert made.trainer.optimizers[0].param_groups[0]["lr"] == 0.125
