"""LambMixin: optimizer, schedule and clipping of a LightningModule, under one process, DDP, FSDP1 and FSDP2."""

from __future__ import annotations

from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lightning_lamb import GroupRules, LambMixin, LargeBatch, Lars, StagedWarmup
from lightning_lamb.errors import ConflictError, InvalidOptionError, PlanError
from tests.distributed import run_ranks
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data

Configured = LambMixin.configure_optimizers


class Model(LambMixin, Regression):
    """Regression with the mixin's optimizer instead of its own."""

    lamb_lr = 0.02


def fit(module: Any, *, samples: int = 32, micro_batch: int = 4, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": [Recorder()]} | options))
    trainer.fit(module, datamodule=Batches(regression_data(samples), micro_batch))
    return trainer


# ---- configuration


def test_it_configures_a_named_lamb_that_exempts_by_shape() -> None:
    optimizer = fit(Model()).optimizers[0]
    assert set(optimizer.trust_ratios) == {"net.0.weight", "net.3.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_attributes_of_class_and_instance_are_the_options() -> None:
    class Tuned(Model):
        lamb_options = {"weight_decay": 0.1, "max_grad_norm": 1.0}
        lamb_group_rules = GroupRules(no_adapt_names=["net.3"])
        lamb_schedule = {"warmup_fraction": 0.5}

    module = Tuned()
    module.lamb_lr = 0.08
    trainer = fit(module)
    optimizer = trainer.optimizers[0]
    assert set(optimizer.trust_ratios) == {"net.0.weight"}
    assert max(group["weight_decay"] for group in optimizer.param_groups) == 0.1
    assert module.rates[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert isinstance(trainer.lr_scheduler_configs[0].scheduler, StagedWarmup)
    assert trainer.lr_scheduler_configs[0].interval == "step"


def test_groups_and_optimizer_can_be_overridden() -> None:
    class Grouped(Model):
        lamb_optimizer = Lars
        lamb_options = {"momentum": 0.8}

        def lamb_param_groups(self) -> list[dict[str, Any]]:
            return [
                {"params": list(self.net[0].named_parameters())},
                {"params": list(self.net[3].named_parameters()), "lr": 0.5},
            ]

    optimizer = fit(Grouped()).optimizers[0]
    assert type(optimizer) is Lars
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.5]


def test_large_batch_scales_the_mixins_rate_and_adds_its_warm_up() -> None:
    plain, scheduled = Model(), Model()
    scheduled.lamb_schedule = {"shape": "constant"}
    for module in (plain, scheduled):
        fit(module, callbacks=[LargeBatch(8, base_batch_size=2, warmup_steps=2), Recorder()])
        assert module.rates[:2] == pytest.approx([0.02, 0.04])
    assert scheduled.rates[2:] == pytest.approx([0.04, 0.04])
    assert plain.rates[2:] == pytest.approx([0.02, 0.01])


def test_an_option_that_does_not_exist_is_named() -> None:
    module = Model()
    module.lamb_options = {"weight_decai": 0.1}
    with pytest.raises(InvalidOptionError, match=r"lamb_options: unknown key 'weight_decai'.*'weight_decay'"):
        fit(module)
    module.lamb_options = {"weight_decay": -1.0}
    with pytest.raises(InvalidOptionError, match="weight_decay"):
        fit(module)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("lamb_schedule", {"warmup_fractions": 0.1}, "lamb_schedule: unknown key 'warmup_fractions'.*warmup_fraction'"),
        ("lamb_schedule", 0.1, "lamb_schedule=0.1 must be a dict"),
        ("lamb_group_rules", {"no_decay_names": ["x"]}, r"must be GroupRules\(...\), not a dict"),
        ("lamb_optimizer", "Lamb", "lamb_optimizer='Lamb' must be the class itself"),
    ],
)
def test_an_attribute_that_means_nothing_is_refused_by_name(attribute: str, value: Any, message: str) -> None:
    module = Model()
    setattr(module, attribute, value)
    with pytest.raises(InvalidOptionError, match=message):
        fit(module)


def test_a_schedule_without_an_end_is_refused() -> None:
    module = Model()
    module.lamb_schedule = {"warmup_steps": 2}
    with pytest.raises(PlanError, match="max_steps"):
        fit(module, max_epochs=-1)


# ---- order of the bases


@pytest.mark.parametrize("package", [lightning.pytorch, pytorch_lightning])
def test_the_mixin_behind_lightning_module_is_refused_with_the_right_order(package: Any) -> None:
    with pytest.raises(ConflictError, match=r"class Wrong\(LambMixin, LightningModule\)"):

        class Wrong(package.LightningModule, LambMixin):
            pass


def test_a_mixin_of_mixins_and_a_plain_class_are_fine() -> None:
    class Mine(LambMixin):
        lamb_lr = 0.5

    class Fine(Mine, LightningModule):
        pass

    assert Fine.configure_optimizers is Configured
    with pytest.raises(ConflictError, match=r"Write class Wrong\(Mine, LightningModule\)"):

        class Wrong(LightningModule, Mine):
            pass


def test_users_of_pytorch_lightning_are_served() -> None:
    """Its Trainer refuses modules of `lightning`, but the mixin has no base, and callbacks go by their hooks."""

    class Other(LambMixin, pytorch_lightning.LightningModule):
        lamb_schedule = {"warmup_steps": 2}

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 2).double()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return (self.net(batch[0]) - batch[1]).pow(2).mean()

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[LargeBatch(8)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Other(), torch.utils.data.DataLoader(regression_data(32), 4))
    assert trainer.accumulate_grad_batches == 2
    assert list(trainer.optimizers[0].trust_ratios) == ["net.weight"]


# ---- clipping


def clipped_gradients(module: Regression, **options: Any) -> list[Tensor]:
    class AfterClipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            seen.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))
            return loss

    seen: list[Tensor] = []
    module.make_optimizer = lambda named: AfterClipping([p for _, p in named], lr=0.0)
    fit(module, **options)
    return seen


class RecordsClipped(Model):
    """Keeps all gradients as the optimizer's step gets them."""

    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        super().configure_gradient_clipping(optimizer, *arguments, **options)
        self.clipped = torch.cat([parameter.grad.flatten() for parameter in self.parameters()])


@pytest.mark.parametrize(("algorithm", "bound"), [("norm", 0.1), ("value", 0.02), (None, 0.1)])
def test_clipping_is_what_lightning_does_on_one_device(algorithm: str | None, bound: float) -> None:
    ours = RecordsClipped()
    fit(ours, gradient_clip_val=bound, gradient_clip_algorithm=algorithm, max_steps=1)
    (theirs,) = clipped_gradients(Regression(), gradient_clip_val=bound, gradient_clip_algorithm=algorithm, max_steps=1)
    torch.testing.assert_close(ours.clipped, theirs, rtol=2e-5, atol=1e-12)  # torch adds 1e-6 to the norm
    assert float(ours.clipped.norm() if algorithm != "value" else ours.clipped.abs().max()) == pytest.approx(bound)


def test_gradients_below_the_bound_are_untouched() -> None:
    free, bounded = RecordsClipped(), RecordsClipped()
    fit(free, max_steps=1)
    fit(bounded, max_steps=1, gradient_clip_val=1e6)
    assert torch.equal(free.clipped, bounded.clipped)


def test_double_clipping_is_refused() -> None:
    module = Model()
    module.lamb_options = {"max_grad_norm": 1.0}
    with pytest.raises(ConflictError, match="clipped twice"):
        fit(module, gradient_clip_val=1.0)


def test_a_module_with_another_optimizer_keeps_lightnings_clipping() -> None:
    class Other(Model):
        lamb_lr = 1e-3

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for group in self.lamb_param_groups() for _, p in group["params"]], self.lamb_lr)

    module = Other()
    fit(module, gradient_clip_val=1e-3, max_steps=1)
    assert torch.cat([p.grad.flatten() for p in module.parameters()]).norm() <= 1e-3 + 1e-9


# ---- sharded


class CPUFSDP(FSDPStrategy):
    """Lightning's FSDP1 on CPU: its check wants the very class, torch wants a device_id."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return torch.distributed.fsdp.FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=self.kwargs["auto_wrap_policy"]
        )


class Sharded(Model):
    """Shards itself under ModelParallelStrategy (FSDP2)."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def trained_on_a_rank(kind: str, clip: float | None) -> dict[str, Any]:
    strategy = {
        "ddp": lambda: "ddp",
        "fsdp1": lambda: CPUFSDP(auto_wrap_policy={nn.Linear}),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }[kind]()
    module = Sharded()
    trainer = fit(
        module,
        devices=2,
        strategy=strategy,
        max_epochs=2,
        gradient_clip_val=clip,
        use_distributed_sampler=False,
        callbacks=[LargeBatch(8, warmup_steps=2)],
        micro_batch=2,
    )
    optimizer = trainer.optimizers[0]
    ratios = {name: float(ratio) for name, ratio in optimizer.trust_ratios.items()}
    moved = {name: float(norm) for name, norm in optimizer.weight_norms.items()}
    return {"ratios": ratios, "weight_norms": moved, "decays": [g["weight_decay"] for g in optimizer.param_groups]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_ranks_train_and_clip_like_one_whatever_the_sharding(kind: str) -> None:
    """Lightning refuses norm clipping under FSDP1; the trust ratios and norms of whole layers must come out."""
    whole = Model()
    optimizer = fit(
        whole, max_epochs=2, gradient_clip_val=0.05, callbacks=[LargeBatch(8, warmup_steps=2)], micro_batch=2
    ).optimizers[0]
    tolerance = 1e-6 if kind == "fsdp1" else 1e-9  # Lightning's FSDP1 strategy turns the module to float32
    for result in run_ranks(trained_on_a_rank, 2, kind, 0.05, init_group=False):
        assert result["decays"] == [0.01, 0.0]
        assert result["ratios"] == pytest.approx(
            {n: float(r) for n, r in optimizer.trust_ratios.items()}, rel=tolerance
        )
        assert result["weight_norms"] == pytest.approx(
            {n: float(r) for n, r in optimizer.weight_norms.items()}, rel=tolerance
        )
