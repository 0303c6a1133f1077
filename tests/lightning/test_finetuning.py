"""Layers that are frozen first and added to the optimizer later, beside LargeBatch and LambMixin."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from torch import nn

from lightning_lamb import Lamb, LambMixin, LargeBatch, StagedWarmup
from lightning_lamb.errors import ConflictError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


class Adds(BaseFinetuning):
    """Freezes the first layer, and trains it from the second epoch on with a rate of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)


class Trains(Regression):
    """Gives its optimizer what is not frozen, named or not."""

    names = False
    kind: Any = torch.optim.AdamW

    def configure_optimizers(self) -> Any:
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        return self.kind(trained if self.names else [p for _, p in trained], lr=0.02)


class AdamW(Trains):
    pass


class NamedAdamW(Trains):
    names = True


class OwnLamb(Trains):
    kind = Lamb


class NamedLamb(OwnLamb):
    names = True


class Mixin(LambMixin, Regression):
    lamb_lr = 0.02


class Scheduled(Mixin):
    lamb_schedule = {"warmup_steps": 2}


class Sharded(Mixin):
    lamb_shard_optimizer_state = True


MODULES = [AdamW, OwnLamb, NamedLamb, Mixin, Scheduled, Sharded]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("callbacks", [[], [LargeBatch(8, base_batch_size=2)]], ids=["alone", "LargeBatch"])
def test_a_layer_that_is_unfrozen_later_trains_with_its_own_rate(module: Any, callbacks: Any) -> None:
    """torch refused the group, because LargeBatch had written names into the others, into AdamW's too."""
    model = module()
    before = model.net[0].weight.detach().clone()
    trainer = quiet_trainer(max_epochs=2, callbacks=[*callbacks, Adds()])
    trainer.fit(model, Batches(regression_data(32), 4))
    groups = trainer.optimizers[0].param_groups
    assert not torch.equal(before, model.net[0].weight)
    assert float(groups[-1].get("initial_lr", groups[-1]["lr"])) == 1e-3


class Backboned(LambMixin, Regression):
    """Has the attribute that Lightning's callback asks for."""

    lamb_lr = 0.02

    @property
    def backbone(self) -> nn.Module:
        return self.net[0]


def test_lightnings_backbone_finetuning_raises_its_group_every_epoch_beside_large_batch() -> None:
    model = Backboned()
    before = model.net[0].weight.detach().clone()
    callbacks = [LargeBatch(8, base_batch_size=2), BackboneFinetuning(unfreeze_backbone_at_epoch=1)]
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks)
    trainer.fit(model, Batches(regression_data(32), 4))
    assert not torch.equal(before, model.net[0].weight)
    assert len(trainer.optimizers[0].param_groups) > 1


@pytest.mark.parametrize("module", [AdamW, NamedAdamW, OwnLamb, NamedLamb])
def test_groups_and_checkpoints_keep_their_keys_beside_large_batch(module: Any) -> None:
    """`param_names` stayed in AdamW's groups and checkpoints, and outlived LargeBatch there."""
    states = []
    for callbacks in ([], [LargeBatch(8)]):
        trainer = quiet_trainer(max_epochs=1, callbacks=callbacks)
        trainer.fit(module(), Batches(regression_data(32), 4))
        states.append([set(group) for group in trainer.optimizers[0].state_dict()["param_groups"]])
    assert states[0] == states[1]


@pytest.mark.parametrize("first", [True, False], ids=["named first", "named late"])
def test_ours_takes_late_groups_with_names_or_without(first: bool) -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    named = lambda key: [(f"{key}.{name}", p) for name, p in module[key].named_parameters()]
    optimizer = Lamb(named("a") if first else module["a"].parameters(), lr=0.1)
    optimizer.add_param_group({"params": module["b"].parameters() if first else named("b")})
    optimizer.add_param_group({"params": module["c"].weight})
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = list(optimizer.trust_ratios)
    assert len(names) == 3
    assert names[0] == ("a.weight" if first else "group0.param0")


def test_a_layer_frozen_and_thawed_in_the_middle_keeps_training() -> None:
    class Thaws(Mixin):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch != 1)

    model = Thaws()
    trainer = quiet_trainer(max_epochs=3, callbacks=[LargeBatch(8, base_batch_size=2)])
    trainer.fit(model, Batches(regression_data(32), 4))
    steps = {name: float(trainer.optimizers[0].state[p]["step"]) for name, p in model.named_parameters()}
    assert steps["net.3.weight"] == 12.0
    assert steps["net.0.weight"] == 8.0


def test_a_tensor_outside_the_module_trains_beside_large_batch() -> None:
    """It was taken for a parameter that the strategy had replaced, and refused."""

    class WithBox(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.box = [nn.Parameter(torch.zeros(2, dtype=torch.float64))]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) + self.box[0] - batch[1]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *self.box], lr=0.1)

    model = WithBox()
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)]).fit(model, Batches(regression_data(32), 4))
    assert float(model.box[0].detach().abs().sum()) > 0


def test_an_optimizer_of_other_tensors_only_is_refused() -> None:
    other = Regression()
    model = Regression(optimizer=lambda named: Lamb(other.named_parameters(), lr=0.1))
    with pytest.raises(ConflictError, match="Regression has none of them: training would change nothing"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)]).fit(model, Batches(regression_data(32), 4))


def test_a_late_groups_rate_is_its_makers_under_large_batchs_schedule_too() -> None:
    parameter, late = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([("first", parameter)], lr=0.1)
    schedule = StagedWarmup(optimizer, total_steps=10)
    optimizer.add_param_group({"params": [late], "lr": 0.01})
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.09, 0.009])


@pytest.mark.parametrize("epoch", [0, 1])
def test_layers_that_a_finetuning_callback_freezes_again_in_a_resumed_training_are_told(
    tmp_path: Path, epoch: int
) -> None:
    """Lightning's BaseFinetuning restores its groups, but not that their layers train: they stayed as they were."""

    class Thaws(AdamW):
        def on_fit_start(self) -> None:
            self.net.requires_grad_(True)

    def run(kind: type[AdamW], resume: Path | None = None, *callbacks: Any) -> tuple[Any, list[str]]:
        model = kind()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = quiet_trainer(max_epochs=3, callbacks=[LargeBatch(8), Adds(), *callbacks])
            trainer.fit(model, Batches(regression_data(32), 4), ckpt_path=resume and str(resume))
        return model, [str(one.message) for one in caught if "may differ" in str(one.message)]

    class Saves(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == epoch:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole, _ = run(AdamW, None, Saves())
    resumed, texts = run(AdamW, tmp_path / "saved.ckpt")
    if epoch == 0:  # unfrozen in the epoch that comes
        assert texts == []
    else:
        assert len(texts) == 1
        assert "trained when the checkpoint was saved: net.0.weight, net.0.bias; unfreeze" in texts[0]
        assert not resumed.net[0].weight.requires_grad
        resumed, texts = run(Thaws, tmp_path / "saved.ckpt")
        assert texts == []
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
