"""Clipping of a LambMixin: the Trainer's, an override's and a manual one, with and without a loss scale; refusals."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_lamb import Lamb, LambMixin, LargeBatch
from lightning_lamb.errors import ConflictError, InvalidOptionError, UnsupportedGradientError
from tests.lightning.toys import Batches, quiet_trainer, regression_data

BOUND = 0.05


class Model(LambMixin, LightningModule):
    """A small network in float32, which notes what the step gets."""

    lamb_lr = 0.02

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        self.lamb_options = options
        self.clipped: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0].float()) - batch[1].float()).pow(2).mean()

    def gradients(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.parameters()])

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        super().configure_gradient_clipping(*arguments, **options)
        self.clipped.append(self.gradients())


class ByHand(Model):
    """Clips as Lightning's documentation shows it."""

    asked: dict[str, Any] = {}

    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        self.clip_gradients(optimizer, **{**options, **self.asked})
        self.clipped.append(self.gradients())


def scaled() -> MixedPrecision:
    """A GradScaler on the CPU; autocast would round, and is left out."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))
    plugin.forward_context = contextlib.nullcontext
    return plugin


def fit(module: Any, **options: Any) -> Any:
    trainer = quiet_trainer(**({"max_steps": 2, "gradient_clip_val": BOUND} | options))
    trainer.fit(module, datamodule=Batches(regression_data(32), 4))
    return module


@pytest.mark.parametrize("kind", [Model, ByHand])
@pytest.mark.parametrize("fused", [None, True], ids=["unscaled by the scaler", "fused"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("callbacks", [[], [LargeBatch(8)]], ids=["alone", "LargeBatch"])
def test_a_loss_scale_changes_nothing(kind: type, fused: Any, algorithm: str, callbacks: list[Any]) -> None:
    """With fused=True the scaler leaves its scale in the gradients: they were clipped to a 16384th of the bound."""
    options = {"gradient_clip_algorithm": algorithm, "callbacks": callbacks}
    plain = fit(kind(), **options)
    with_scale = fit(kind(fused=fused), plugins=[scaled()], **options)
    torch.testing.assert_close(with_scale.clipped, plain.clipped, rtol=1e-5, atol=1e-9)
    measured = plain.clipped[0].norm() if algorithm == "norm" else plain.clipped[0].abs().max()
    assert float(measured) == pytest.approx(BOUND, rel=1e-5)
    torch.testing.assert_close(list(with_scale.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)


class Manual(Model):
    """Clips in training_step, where gradients are scaled still."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=BOUND, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize("fused", [None, True])
def test_manual_optimization_clips_scaled_gradients_to_the_bound(fused: Any) -> None:
    plain = fit(Manual(), gradient_clip_val=None)
    with_scale = fit(Manual(fused=fused), gradient_clip_val=None, plugins=[scaled()])
    torch.testing.assert_close(list(with_scale.parameters()), list(plain.parameters()), rtol=1e-5, atol=1e-7)


class Overflows(Model):
    """An infinite gradient in the first step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 0 and not self.clipped:
            self.net[0].weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_an_overflow_is_not_clamped_away_before_the_step_is_skipped(algorithm: str) -> None:
    module = Overflows(fused=True)
    before = module.net[0].weight.detach().clone()
    fit(module, max_steps=1, plugins=[scaled()], gradient_clip_algorithm=algorithm)
    assert torch.equal(before, module.net[0].weight)


def test_lightning_refuses_a_fused_optimizer_of_a_module_without_the_mixin() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 2)

        training_step = Model.training_step

        def configure_optimizers(self) -> Any:
            return Lamb(self.named_parameters(), fused=True)

    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Plain(), plugins=[scaled()])


# ---- what Lightning's own hook refuses, or leaves alone


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"gradient_clip_val": 0.7}, ConflictError, r"gradient_clip_val=0.05\).*gradient_clip_val=0.7.* leave one"),
        ({"gradient_clip_algorithm": "value"}, ConflictError, r"'norm'\).*'value'\) differ"),
        ({"gradient_clip_algorithm": "norms"}, InvalidOptionError, r"gradient_clip_algorithm='norms'.*'norm'\?"),
        ({"gradient_clip_val": "0.05"}, ConflictError, "different"),
    ],
)
def test_a_call_that_contradicts_the_trainer_is_refused(asked: dict[str, Any], error: type, message: str) -> None:
    module = ByHand()
    module.asked = asked
    with pytest.raises(error, match=message):
        fit(module, gradient_clip_algorithm="norm")


def test_a_bound_that_is_no_number_is_refused() -> None:
    module = ByHand()
    module.asked = {"gradient_clip_val": "0.05"}
    with pytest.raises(InvalidOptionError, match=r"gradient_clip_val='0\.05' must be a number"):
        fit(module, gradient_clip_val=None)


def test_what_a_call_leaves_out_is_the_trainers() -> None:
    module = ByHand()
    module.asked = {"gradient_clip_val": None, "gradient_clip_algorithm": None}
    fit(module, gradient_clip_algorithm="value")
    assert float(module.clipped[0].abs().max()) == pytest.approx(BOUND)
    module = ByHand()
    module.asked = {"gradient_clip_algorithm": "VALUE"}
    fit(module)
    assert float(module.clipped[0].abs().max()) == pytest.approx(BOUND)


@pytest.mark.parametrize("bound", [0, -1.0, None])
def test_no_positive_bound_clips_nothing(bound: float | None) -> None:
    """A negative bound, which Lightning takes for none, turned the gradients round."""
    free, module = fit(Model(), gradient_clip_val=None), fit(Model(), gradient_clip_val=bound)
    assert torch.equal(free.clipped[0], module.clipped[0])


class Sparse(Model):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6, sparse=True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(self.table(torch.arange(4))).square().mean()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_sparse_gradient_is_refused_by_name_before_it_is_clipped(algorithm: str) -> None:
    with pytest.raises(UnsupportedGradientError, match=r"table\.weight: its gradient is sparse"):
        fit(Sparse(), gradient_clip_algorithm=algorithm)
