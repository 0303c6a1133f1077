"""LambMixin is used, or its user hears why not: overrides that leave it aside, and attributes that nothing reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lamb import GroupRules, Lamb, LambMixin, LargeBatch, Lars, lamb_param_groups
from lightning_lamb.errors import ConflictError, InvalidOptionError
from tests.distributed import run_ranks
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


class Model(LambMixin, Regression):
    """Regression with the mixin's optimizer."""


def fit(module: Any, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1} | options))
    trainer.fit(module, datamodule=Batches(regression_data(16), 4))
    return trainer


class LeftOver(Model):
    """Ported by adding the mixin; the old configure_optimizers was forgotten."""

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.SGD(self.parameters(), 0.1)}


class Inherited(LeftOver):
    """Inherits it."""


class Earlier:
    """A class of another package that stands before the mixin."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1)], []  # type: ignore[attr-defined]


class Behind(Earlier, Model):
    """Wins by the order of the bases."""


@pytest.mark.parametrize("kind", [LeftOver, Inherited, Behind])
@pytest.mark.parametrize("callbacks", [[], [LargeBatch(8)]], ids=["alone", "LargeBatch"])
def test_a_configure_optimizers_that_leaves_the_mixin_aside_is_refused(kind: type, callbacks: list[Any]) -> None:
    """It won silently: the model trained with SGD."""
    for _ in range(2):  # a second fit hears it, too
        with pytest.raises(ConflictError, match=rf"{kind.__name__} has LambMixin.* returns SGD without.*Delete"):
            fit(kind(), callbacks=callbacks)


def refused_on_a_rank() -> str:
    try:
        fit(LeftOver(), devices=2, strategy="ddp")
    except ConflictError as error:
        return str(error)
    return ""


def test_it_is_refused_on_every_rank() -> None:
    assert all("returns SGD" in message for message in run_ranks(refused_on_a_rank, 2, init_group=False))


class CallsSuper(Model):
    lamb_lr = 0.3

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.param_groups[0]["lr"] = 0.1
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}


class SuperOfOverride(CallsSuper):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()


class OwnGroups(Model):
    lamb_lr = 0.3
    lamb_options = {"weight_decay": 0.1}

    def configure_optimizers(self) -> Any:
        return Lars(self.lamb_param_groups(), lr=self.lamb_lr)


class GroupsForAnother(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for group in self.lamb_param_groups() for _, p in group["params"]], 0.1)


class FunctionsGroups(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for group in lamb_param_groups(self) for _, p in group["params"]], 0.1)


class OwnLamb(Model):
    def configure_optimizers(self) -> Any:
        return Lamb(self.named_parameters(), lr=0.1)


class Discards(LeftOver):
    """Overrides a parent that leaves the mixin aside."""

    def configure_optimizers(self) -> Any:
        super().configure_optimizers()
        return LambMixin.configure_optimizers(self)


class Nothing(Model):
    def configure_optimizers(self) -> Any:
        return None


LEGITIMATE = [CallsSuper, SuperOfOverride, OwnGroups, GroupsForAnother, FunctionsGroups, OwnLamb, Discards, Nothing]


@pytest.mark.parametrize("kind", LEGITIMATE)
def test_an_override_that_uses_the_mixin_or_its_optimizers_trains(kind: type) -> None:
    trainer = fit(kind())
    assert trainer.state.finished


def test_an_optimizer_set_on_the_instance_is_an_explicit_choice() -> None:
    """As LightningCLI does for ``--optimizer``."""
    module = Model()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    assert type(fit(module).optimizers[0]) is torch.optim.SGD


# ---- attributes


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("lamb_learning_rate", 0.5, "Did you mean 'lamb_lr'"),
        ("lamb_rl", 0.5, "Did you mean 'lamb_lr'"),
        ("lamb_option", {"adapt": False}, "Did you mean 'lamb_options'"),
        ("lamb_optimiser", Lars(nn.Linear(1, 1).parameters()).defaults, "Did you mean 'lamb_optimizer'"),
        ("lamb_weight_decay", 0.1, r"Did you mean lamb_options = \{'weight_decay': ...\}"),
        ("lamb_warmup_steps", 5, r"Did you mean lamb_schedule = \{'warmup_steps': ...\}"),
        ("lamb_counter", 0, "needs a name without the prefix"),
        ("lamb_nothing", None, "Known: lamb_lr"),
    ],
)
def test_an_attribute_that_the_mixin_does_not_know_is_refused(name: str, value: Any, meant: str) -> None:
    """A misspelt learning rate was ignored, and the default one trained."""
    on_class = type("Slip", (Model,), {name: value})()
    on_instance = Model()
    setattr(on_instance, name, value)
    on_override = type("Slip", (OwnLamb,), {name: value})()
    for module in (on_class, on_instance, on_override):
        with pytest.raises(InvalidOptionError, match=rf"{name}=.* would be ignored\..*{meant}"):
            fit(module)


def test_a_misspelt_method_is_refused() -> None:
    class Slip(Model):
        def lamb_param_group(self) -> Any:
            return []

    with pytest.raises(InvalidOptionError, match=r"lamb_param_group\(\) of Slip.*Did you mean 'lamb_param_groups'"):
        fit(Slip())


def test_methods_layers_and_objects_may_begin_with_the_prefix() -> None:
    class Fine(Model):
        lamb_hook = staticmethod(print)
        lamb_settings = type("Settings", (), {})

        def __init__(self) -> None:
            super().__init__()
            self.lamb_head = nn.Linear(2, 2).double()
            self.lamb_weight = nn.Parameter(torch.ones(2, 2))
            self.register_buffer("lamb_buffer", torch.ones(2))
            self.lamb_criterion = nn.MSELoss()

        def lamb_loss(self) -> None:
            pass

        @property
        def lamb_lr(self) -> float:
            return 0.25

    assert fit(Fine()).optimizers[0].param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [("lamb_lr", 0.5), ("lamb_schedule", {"warmup_steps": 2}), ("lamb_options", {"max_grad_norm": 1.0})],
)
def test_an_attribute_that_an_override_leaves_aside_is_refused(name: str, value: Any) -> None:
    for parent in (OwnLamb, GroupsForAnother, Nothing):
        module = type("Unread", (parent,), {name: value})()
        with pytest.raises(ConflictError, match=rf"{name}=.* of Unread has no effect"):
            fit(module)


def test_an_attribute_that_is_read_somewhere_in_the_class_counts_as_used() -> None:
    class Reads(Model):
        lamb_lr = 0.5
        lamb_options = {"max_grad_norm": 1.0}

        def __init__(self) -> None:
            super().__init__()
            self.half = self.lamb_lr / 2

        def build(self) -> Any:
            return Lamb(self.named_parameters(), lr=self.half, **getattr(self, "lamb_options"))

        def configure_optimizers(self) -> Any:
            return self.build()

    assert fit(Reads()).optimizers[0].param_groups[0]["lr"] == 0.25


def test_rules_beside_own_groups_that_do_not_use_them_are_refused() -> None:
    class Own(Model):
        lamb_group_rules = GroupRules(no_decay_names=["net"])

        def lamb_param_groups(self) -> Any:
            return [{"params": self.named_parameters()}]

    with pytest.raises(ConflictError, match="lamb_group_rules of Own has no effect"):
        fit(Own())

    class Extended(Own):
        def lamb_param_groups(self) -> Any:
            return LambMixin.lamb_param_groups(self)

    assert {group["weight_decay"] for group in fit(Extended()).optimizers[0].param_groups} == {0.0}


def test_two_learning_rates_are_refused() -> None:
    class Both(Model):
        lamb_lr = 0.5
        lamb_options = {"lr": 0.25}

    with pytest.raises(ConflictError, match=r"lamb_lr=0.5 and lamb_options=\{'lr': 0.25\} of Both"):
        fit(Both())
    only = Model()
    only.lamb_options = {"lr": 0.25}
    assert fit(only).optimizers[0].param_groups[0]["lr"] == 0.25


def test_an_attribute_of_a_base_behind_the_mixin_is_refused() -> None:
    class Base(Regression):
        lamb_lr = 0.5

    class Hidden(LambMixin, Base):
        pass

    with pytest.raises(InvalidOptionError, match=r"lamb_lr of Base is hidden by LambMixin.*set it in Hidden"):
        fit(Hidden())
