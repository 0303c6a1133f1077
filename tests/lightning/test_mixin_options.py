"""Options of LambMixin: what the optimizer itself does with them is what trains, or their contradiction is named."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lamb import GroupRules, Lamb, LambMixin, LargeBatch, Lars, lamb_param_groups, presets
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


class Model(LambMixin, Regression):
    """Regression with the mixin's optimizer."""

    lamb_lr = 0.02


def fit(module: Any, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1} | options))
    trainer.fit(module, datamodule=Batches(regression_data(32), 4))
    return trainer


def effect(optimizer: Any) -> dict[str, tuple[float, bool]]:
    """Name -> (weight decay, whether it has a trust ratio), as the optimizer really steps."""
    slots = optimizer.plan().slots
    decays = [0.0 if slot.exempt else optimizer.param_groups[slot.group]["weight_decay"] for slot in slots]
    return {slot.piece.layer.name: (decay, slot.adapt) for slot, decay in zip(slots, decays)}


SAID: list[tuple[Any, dict[str, Any]]] = [
    (Lamb, {}),
    (Lamb, {"adapt": False}),
    (Lamb, {"adapt": "decayed"}),
    (Lamb, {"adapt": "decayed", "weight_decay": 0.0}),
    (Lamb, {"exempt_1d": False}),
    (Lamb, {"exempt_1d": False, "adapt": False, "weight_decay": 0.3}),
    (Lars, {"exempt_1d": False, "adapt": "decayed"}),
    (presets.paper_lamb, {}),
    (presets.tfa_lamb, {}),
    (presets.nvlamb, {"weight_decay": 0.0}),
    (presets.nvlamb, {"weight_decay": 0.0, "use_nvlamb": True}),
    (presets.timm_lamb, {"always_adapt": True}),
    (presets.deepspeed_lamb, {"weight_decay": 0.1}),
    (functools.partial(Lamb, adapt=False, weight_decay=0.2), {}),
]


@pytest.mark.parametrize(("make", "options"), SAID)
def test_the_mixin_does_what_the_optimizer_does_with_the_same_options(make: Any, options: dict[str, Any]) -> None:
    """The mixin's groups said ``adapt`` and ``weight_decay`` themselves, so that the optimizer's were ignored."""
    module = Model()
    module.lamb_optimizer, module.lamb_options = make, options
    built = fit(module, max_steps=1).optimizers[0]
    plain = make(list(Model().named_parameters()), lr=0.02, **options)
    assert effect(built) == effect(plain)


@pytest.mark.parametrize(("make", "options"), SAID[1:6])
def test_groups_of_a_model_follow_the_optimizer_that_takes_them(make: Any, options: dict[str, Any]) -> None:
    model = Model()
    assert effect(make(lamb_param_groups(model), **options)) == effect(make(list(model.named_parameters()), **options))


@pytest.mark.parametrize("options", [{"adapt": False}, {"exempt_1d": False}, {"weight_decay": 0.5}])
def test_a_divided_state_changes_no_option(options: dict[str, Any]) -> None:
    module = Model()
    module.lamb_shard_optimizer_state, module.lamb_options = True, options
    built = fit(module, max_steps=1).optimizers[0]
    assert isinstance(built, ShardedStateOptimizer)
    assert effect(built._built()) == effect(Lamb(list(Model().named_parameters()), **options))


def test_a_function_on_the_class_makes_the_optimizer() -> None:
    """Python makes a method of it, which got the module in the place of the parameters."""

    class Preset(Model):
        lamb_optimizer = presets.nvlamb
        lamb_options = {"max_grad_norm": None}

    assert fit(Preset()).optimizers[0].defaults["adapt"] == "decayed"


def test_rules_stand_above_options_and_keys_of_a_group_above_rules() -> None:
    module = Model()
    module.lamb_options = {"adapt": True, "weight_decay": 0.2}
    module.lamb_group_rules = GroupRules(no_decay_names=[r"net\.0"], no_adapt_1d=False)
    found = effect(fit(module, max_steps=1).optimizers[0])
    assert found["net.0.weight"] == (0.0, True)
    assert found["net.3.weight"] == (0.2, True)
    assert found["net.3.bias"] == (0.0, True)

    groups = lamb_param_groups(Model())
    groups[0]["adapt"] = False
    assert not any(adapts for _, adapts in effect(Lamb(groups, adapt=True)).values())


@pytest.mark.parametrize(("rule", "said"), [("no_decay_1d", True), ("no_adapt_1d", True), ("no_decay_1d", False)])
def test_an_exemption_that_contradicts_a_rule_is_refused_by_name(rule: str, said: bool) -> None:
    module = Model()
    module.lamb_options = {"exempt_1d": not said}
    module.lamb_group_rules = GroupRules(**{rule: said})
    with pytest.raises(InvalidOptionError, match=rf"exempt_1d={not said}.*{rule}={said}.*Leave exempt_1d out"):
        fit(module)


def test_rules_may_name_what_is_frozen_now() -> None:
    module = Model()
    module.net[0].requires_grad_(False)
    module.lamb_group_rules = GroupRules(no_decay_names=[r"net\.0"])
    assert "net.0.weight" not in effect(fit(module, max_steps=1).optimizers[0])


# ---- what a module may hold


def test_a_tensor_as_learning_rate_is_left_alone() -> None:
    """A schedule wrote into the tensor on the class, so that the second model of the class did not move."""

    class Warmed(Model):
        lamb_lr = torch.tensor(0.02)
        lamb_schedule = {"warmup_steps": 2}

    moved = []
    for _ in range(2):
        module = Warmed()
        optimizer = fit(module, max_steps=4).optimizers[0]
        moved.append(module.net[0].weight.detach().clone())
        assert len({id(group["lr"]) for group in optimizer.param_groups}) == len(optimizer.param_groups)
    assert torch.equal(*moved)
    assert float(Warmed.lamb_lr) == pytest.approx(0.02)


class WithRules(Model):
    def __init__(self, rules: GroupRules = GroupRules(no_decay_names=["net.3"])) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_rules_among_the_hyper_parameters_load_without_pickle(tmp_path: Path) -> None:
    trainer = fit(WithRules(), max_steps=1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = WithRules.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    assert loaded.hparams.rules == GroupRules(no_decay_names=["net.3"])


def test_a_model_with_everything_frozen_is_refused_by_name() -> None:
    module = Model()
    module.requires_grad_(False)
    with pytest.raises(InvalidOptionError, match="Model has no parameter to train: all are frozen"):
        fit(module)


class Lazy(Model):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.LazyLinear(9, dtype=torch.float64)


def test_a_lazy_layer_trains_by_the_shape_that_it_gets() -> None:
    optimizer = fit(Lazy()).optimizers[0]
    assert effect(optimizer)["net.0.weight"] == (0.01, True)
    assert effect(optimizer)["net.0.bias"] == (0.0, False)


def test_a_lazy_layer_whose_group_depends_on_its_shape_is_refused() -> None:
    module = Lazy()
    module.lamb_group_rules = GroupRules(no_decay_1d=False)
    with pytest.raises(InvalidOptionError, match=r"net\.0\.\w+ has no shape yet \(a lazy layer\)"):
        fit(module)


# ---- another optimizer in its place


def test_an_optimizer_that_is_not_ours_gets_plain_groups() -> None:
    module = Model()
    module.lamb_optimizer, module.lamb_options = torch.optim.AdamW, {"weight_decay": 0.4}
    optimizer = fit(module).optimizers[0]
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.4]
    assert not any({"adapt", "exempt_1d", "param_names"} & set(group) for group in optimizer.param_groups)


def test_rules_about_ratios_beside_an_optimizer_without_any_are_refused() -> None:
    module = Model()
    module.lamb_optimizer, module.lamb_group_rules = torch.optim.AdamW, GroupRules(no_adapt_names=["net"])
    with pytest.raises(InvalidOptionError, match="no_adapt_names of the group rules beside AdamW"):
        fit(module)


# ---- layers that come later


@pytest.mark.parametrize("with_large_batch", [False, True])
def test_a_layer_that_is_unfrozen_later_trains_under_its_name_and_by_the_rules(with_large_batch: bool) -> None:
    """torch refuses a group without names beside groups with names, and BaseFinetuning adds one."""
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.5)

    class Ruled(Model):
        lamb_group_rules = GroupRules(no_adapt_names=["net.0.weight"])
        lamb_options = {"weight_decay": 0.2}

    module = Ruled()
    before = module.net[0].weight.detach().clone()
    callbacks = [Unfreeze(), *([LargeBatch(8)] if with_large_batch else [])]
    optimizer = fit(module, max_epochs=3, callbacks=callbacks).optimizers[0]
    assert not torch.equal(before, module.net[0].weight)
    found = effect(optimizer)
    assert found["net.0.weight"] == (0.2, False)
    assert found["net.0.bias"] == (0.0, False)
    assert found["net.3.weight"] == (0.2, True)
    late = [group for group in optimizer.param_groups if any("net.0" in name for name in group["param_names"])]
    assert {float(group["lr"]) for group in late} == {0.5}


def test_what_a_late_group_says_itself_stands() -> None:
    model = Model()
    model.net[0].requires_grad_(False)
    optimizer = Lamb(lamb_param_groups(model, rules=GroupRules(no_decay_names=["net"], no_decay_1d=False)))
    model.net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.net[0].named_parameters(prefix="net.0")), "weight_decay": 0.7})
    found: dict[str, tuple[float, bool]] = effect(optimizer)
    assert found["net.0.weight"] == (0.7, True)
    assert found["net.0.bias"] == (0.7, False)


@pytest.mark.parametrize("kind", [Lamb, functools.partial(ShardedStateOptimizer, optimizer_class=Lamb)])
def test_a_late_group_without_names_is_taken_with_or_without_an_annotated_module(kind: Any) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = kind(first.named_parameters())
    optimizer.add_param_group({"params": second.parameters()})
    assert optimizer.param_groups[1]["param_names"] == ["group1.param0", "group1.param1"]
    unnamed = kind(first.parameters())
    unnamed.add_param_group({"params": list(second.named_parameters())})
    for optimizer in (optimizer, unnamed):
        before: Tensor = second.weight.detach().clone()
        second.weight.grad = torch.ones(2, 2)
        optimizer.step()
        assert not torch.equal(before, second.weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_an_optimizer_treats_late_groups_by_the_same_rules(copied: Any) -> None:
    model = Model()
    model.net[0].requires_grad_(False)
    optimizer = copied(Lamb(lamb_param_groups(model, rules=GroupRules(no_adapt_names=["net.0.weight"]))))
    optimizer.add_param_group({"params": [("net.0.weight", nn.Parameter(torch.ones(3, 3)))]})
    assert effect(optimizer)["net.0.weight"] == (0.01, False)
