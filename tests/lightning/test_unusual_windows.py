"""Windows that end otherwise: left open, failed, without a token, fetched by training_step itself, scaled in fp16."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.callbacks import DeferredGradientSync, report_count
from lightning_lamb.errors import ConflictError, InvalidOptionError
from tests.distributed import run_ranks
from tests.lightning.toys import Batches, Recorder, Regression, quiet_trainer, regression_data

TOLERANCE = 1e-6  # float64 gives about 1e-15, so a wrong weight cannot hide in it


class Leaving(Regression):
    """Ends its first epoch inside the second window."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


def test_what_an_epoch_left_open_is_not_in_the_next_window() -> None:
    """The dropped micro-batch was counted in the next window, whose gradient so became a third too small."""
    module, whole = Leaving(), Regression()
    data = Batches(regression_data(24), 4)
    sgd = lambda named: torch.optim.SGD([p for _, p in named], 0.0)
    module.make_optimizer = whole.make_optimizer = sgd
    with pytest.warns(UserWarning, match="ended inside a window.*1 micro-batches"):
        quiet_trainer(max_epochs=2, callbacks=[LargeBatch(8), Recorder()]).fit(module, datamodule=data)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), Recorder()]).fit(whole, datamodule=Batches(data.dataset, 8))
    expected = [whole.gradients[0], *whole.gradients]
    for ours, theirs in zip(module.gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


class Taking(Regression):
    """Fetches its batches itself."""

    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        batch, index, _ = next(dataloader_iter)
        if self.reports:
            report_count(self, len(batch[0]))
        return super().training_step(batch, index)

    reports = False


def test_a_training_step_that_takes_the_iterator_is_asked_for_its_counts() -> None:
    """Hooks see the batch before; with accumulation Lightning drops the first micro-batch of each window."""
    data = DataLoader(regression_data(10), 4)
    with pytest.raises(ConflictError, match="cannot accumulate: Lightning sets the gradients to zero"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)]).fit(Taking(), data)
    with pytest.raises(InvalidOptionError, match=r"does not see the batches.*report_count"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(4)]).fit(Taking(), data)
    module = Taking()
    module.reports = True
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(4)])
    trainer.fit(module, data)
    assert trainer.global_step == 3


def test_gradients_that_fsdp2_holds_do_not_reach_the_next_window() -> None:
    """zero_grad does not reach what FSDP2 accumulates before it communicates."""
    accumulating = iter([True, True, False, False])  # start and end of two micro-batches
    synced: list[bool] = []
    module = SimpleNamespace(set_requires_gradient_sync=lambda wanted, recurse: synced.append(wanted))
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(_should_accumulate=lambda: next(accumulating)))
    callback, unused = DeferredGradientSync(), cast("Any", None)
    callback._modules = [module]
    for _ in range(2):  # a window of two micro-batches, and the beginning of the next
        callback.on_train_batch_start(trainer, unused, None, 0)
        callback.on_train_batch_end(trainer, unused, None, None, 0)
    assert synced == [False, True]
    callback.on_before_zero_grad(trainer, unused, unused)
    accumulating = iter([True])
    callback.on_train_batch_end(trainer, unused, None, None, 0)
    with pytest.raises(ConflictError, match=r"ended inside a window.*DeferredGradientSync"):
        callback.on_before_zero_grad(trainer, unused, unused)
    synced.clear()
    callback.on_exception(trainer, unused, RuntimeError())
    assert synced == [True], "the module communicates again"


class Failing(Regression):
    """Fails once, inside a window."""

    failed = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx == 1 and not self.failed:
            self.failed = True
            raise RuntimeError("once")
        return super().training_step(batch, batch_idx)


def test_a_fit_after_one_that_failed_begins_a_clean_window() -> None:
    module, fresh, callback = Failing(), Regression(), LargeBatch(8)
    data = regression_data(16)
    with pytest.raises(RuntimeError, match="once"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=Batches(data, 4))
    quiet_trainer(max_epochs=1, callbacks=[callback, Recorder()]).fit(module, datamodule=Batches(data, 4))
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8), Recorder()]).fit(fresh, datamodule=Batches(data, 4))
    for ours, theirs in zip(module.gradients, fresh.gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_a_resume_inside_an_epoch_after_a_fit_that_failed_begins_a_clean_window(tmp_path: Path) -> None:
    """Lightning calls no on_train_epoch_start then, and the micro-batch of the failed window was counted again."""
    data, path = regression_data(32), tmp_path / "inside.ckpt"

    class FailsInTheThirdWindow(Regression):
        failed = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 5 and not self.failed:
                self.failed = True
                raise RuntimeError("once")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 1 and not self.failed:
                self.trainer.save_checkpoint(path)

    module, callback = FailsInTheThirdWindow(), LargeBatch(8)
    with pytest.raises(RuntimeError, match="once"):
        quiet_trainer(max_epochs=1, callbacks=[callback]).fit(module, datamodule=Batches(data, 4))
    trainer = quiet_trainer(max_epochs=1, callbacks=[callback])
    trainer.fit(module, datamodule=Batches(data, 4), ckpt_path=str(path))
    assert trainer.global_step == 4


class Masked(LightningModule):
    """The mean over a mask, which leaves nothing of some micro-batches: 0 / 0."""

    def __init__(self, as_tensor: bool, loss_reduction: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 2).double()
        self.as_tensor, self.loss_reduction = as_tensor, loss_reduction
        self.gradients: list[Tensor] = []
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        kept = inputs[:, 0] > (100.0 if batch_idx == 1 else -100.0)
        losses = (self.net(inputs) - targets).pow(2).mean(1)[kept]
        report_count(self, kept.sum() if self.as_tensor else int(kept.sum()))
        return losses.sum() if self.loss_reduction == "sum" else losses.mean()

    def configure_optimizers(self) -> Any:
        return Lamb(self.named_parameters(), lr=0.01)


def train_masked(as_tensor: bool, loss_reduction: str, ranks: int = 1) -> tuple[list[Tensor], float]:
    module = Masked(as_tensor, loss_reduction)
    trainer = quiet_trainer(
        max_steps=1,
        callbacks=[LargeBatch(12 * ranks, loss_reduction=loss_reduction), Recorder()],
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        use_distributed_sampler=False,
    )
    data = regression_data(12) if rank_of_here() == 0 else regression_data(12, seed=1)
    trainer.fit(module, DataLoader(data, 4))
    return module.gradients, float(trainer.callback_metrics["train_loss_window"])


def rank_of_here() -> int:
    return int(os.environ.get("RANK", 0))


def masked_exactly(seeds: list[int]) -> tuple[Tensor, float]:
    module = Masked(False, "mean")
    pairs = [regression_data(12, seed=seed).tensors for seed in seeds]
    inputs, targets = (torch.cat([torch.cat([part[:4], part[8:]]) for part in parts]) for parts in zip(*pairs))
    loss = (module.net(inputs) - targets).pow(2).mean()
    loss.backward()
    return module.net.weight.grad, loss.item()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["count is a number", "count is a tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_micro_batch_without_a_token_adds_nothing(reduction: str, as_tensor: bool) -> None:
    """The mean over nothing is NaN, and NaN times a weight of zero was NaN in every weight."""
    (gradient,), loss = train_masked(as_tensor, reduction)
    exact, exact_loss = masked_exactly([0])
    torch.testing.assert_close(gradient, exact, rtol=TOLERANCE, atol=TOLERANCE)
    assert loss == pytest.approx(exact_loss, rel=1e-6)


def masked_on_a_rank() -> tuple[list[Tensor], float]:
    return train_masked(True, "mean", 2)


def test_so_it_is_on_several_ranks() -> None:
    exact, exact_loss = masked_exactly([0, 1])
    for (gradient,), loss in run_ranks(masked_on_a_rank, 2, init_group=False, timeout=120):
        torch.testing.assert_close(gradient, exact, rtol=TOLERANCE, atol=TOLERANCE)
        assert loss == pytest.approx(exact_loss, rel=1e-6)


def test_the_window_loss_of_scaled_losses_is_the_unscaled_one() -> None:
    """Under fp16 a GradScaler has multiplied the losses that the window gets."""
    from lightning.pytorch.plugins import MixedPrecision

    class Kept(Regression):
        losses: list[float]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(loss) * len(batch[0]))
            return loss

    module = Kept().float()
    module.losses = []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    data = [(inputs.float(), targets.float()) for inputs, targets in regression_data(10)]
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(12)], plugins=plugins)
    trainer.fit(module, DataLoader(data, 4))
    assert float(trainer.callback_metrics["train_loss_window"]) == pytest.approx(sum(module.losses) / 10, rel=1e-6)
