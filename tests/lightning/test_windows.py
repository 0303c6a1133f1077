"""K accumulated micro-batches are one batch of K times the size: short windows, uneven micro-batches, tokens, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.callbacks import report_count
from lightning_lamb.errors import ConflictError, InvalidOptionError
from tests.distributed import rank, run_ranks
from tests.lightning.toys import (
    Batches,
    Recorder,
    Regression,
    largest_difference,
    quiet_trainer,
    regression_data,
    weights,
)

TOLERANCE = 1e-6  # float64 gives about 1e-15, so a wrong weight cannot hide in it


def train_regression(global_batch: int, micro_batch: int, samples: int = 30, **options: Any) -> Regression:
    module = Regression()
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[LargeBatch(global_batch, **options), Recorder()], use_distributed_sampler=False
    )
    trainer.fit(module, datamodule=Batches(regression_data(samples), micro_batch))
    return module


@pytest.mark.parametrize("samples", [32, 30, 29, 33])
def test_accumulated_micro_batches_equal_one_large_batch(samples: int) -> None:
    """32 divides; 30 ends on a short window of 4 + 2, 29 of 4 + 1, 33 of a single sample."""
    accumulated, whole = train_regression(8, 4, samples), train_regression(8, 8, samples)
    assert accumulated.micro_batches[:2] == [4, 4]
    assert len(accumulated.gradients) == len(whole.gradients) == 3 * -(-samples // 8)
    for ours, theirs in zip(accumulated.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert largest_difference(weights(accumulated), weights(whole)) < TOLERANCE


def test_lightnings_mean_of_means_is_wrong_on_a_short_window() -> None:
    """The bug that exact_windows repairs (Lightning #19987): the tests above can fail."""
    plain, whole = train_regression(8, 4, 30, exact_windows=False), train_regression(8, 8, 30)
    assert largest_difference(weights(plain), weights(whole)) > 1e-3


def test_full_even_windows_are_bitwise_what_lightning_does() -> None:
    """Exact windows cost nothing where there is nothing to correct."""
    assert (
        largest_difference(
            weights(train_regression(8, 4, 32)), weights(train_regression(8, 4, 32, exact_windows=False))
        )
        == 0.0
    )


def regression_on_a_rank(global_batch: int, micro_batch: int, samples: int) -> dict[str, Any]:
    module = Regression()
    trainer = quiet_trainer(
        devices=2,
        strategy="ddp",
        max_epochs=3,
        callbacks=[LargeBatch(global_batch), Recorder()],
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Batches(regression_data(samples), micro_batch))
    return {"weights": weights(module), "gradients": module.gradients, "sizes": module.micro_batches}


def test_two_ranks_equal_one_large_batch_with_a_short_window() -> None:
    """30 samples on 2 ranks, micro-batches 4 4 4 3: windows of 16 and 14 samples."""
    whole = train_regression(16, 16, 30)
    for result in run_ranks(regression_on_a_rank, 2, 16, 4, 30, init_group=False):
        assert result["sizes"][:4] == [4, 4, 4, 3]
        for ours, theirs in zip(result["gradients"], whole.gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        assert largest_difference(result["weights"], weights(whole)) < TOLERANCE


# ---- tokens: every sample has its own length, so every micro-batch has its own count

LENGTHS = [3, 7, 1, 9, 2, 2, 8, 4, 5, 6]


def sequences(indices: list[int]) -> Tensor:
    return torch.cat(
        [torch.randn(LENGTHS[i], 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in indices]
    )


def token_losses(layer: nn.Module, indices: list[int]) -> Tensor:
    return (layer(sequences(indices)) - 1.0).pow(2).flatten()


class Tokens(LightningModule):
    """Returns the mean or the sum over its tokens, and reports their number, as a number or as a tensor."""

    def __init__(self, reduction: str, as_tensor: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()
        self.reduction, self.as_tensor = reduction, as_tensor
        self.rates: list[float] = []
        self.gradients: list[Tensor] = []

    def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
        losses = token_losses(self.layer, indices.tolist())
        report_count(self, torch.tensor(len(losses)) if self.as_tensor else len(losses))
        return losses.sum() if self.reduction == "sum" else losses.mean()

    def configure_optimizers(self) -> Any:
        return Lamb(self.named_parameters(), lr=0.0)  # gradients at the same weights in every window


def train_tokens(reduction: str, as_tensor: bool, ranks: int, micro_batch: int = 1) -> list[Tensor]:
    module = Tokens(reduction, as_tensor)
    trainer = quiet_trainer(
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        callbacks=[LargeBatch(4, loss_reduction=reduction), Recorder()],
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=Batches(torch.arange(10), micro_batch))
    return module.gradients


def token_mean_gradients(last: tuple[int, ...] | list[int] = (8, 9)) -> list[Tensor]:
    """By hand: windows of 4, 4 and usually 2 sequences, every token with the same weight."""
    found = []
    for window in ([0, 1, 2, 3], [4, 5, 6, 7], list(last)):
        module = Tokens("mean", False)
        token_losses(module.layer, window).mean().backward()
        found.append(module.layer.weight.grad)
    return found


@pytest.mark.parametrize("as_tensor", [False, True], ids=["count is a number", "count is a tensor"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_ragged_tokens_have_equal_weight_in_every_window(reduction: str, as_tensor: bool, micro_batch: int) -> None:
    """The mean of means was 49 to 65 % off here (Lightning #20350)."""
    for ours, exact in zip(train_tokens(reduction, as_tensor, 1, micro_batch), token_mean_gradients(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ragged_tokens_have_equal_weight_over_ranks(ranks: int) -> None:
    """On four ranks the sampler fills the last window up with the first two sequences."""
    exact = token_mean_gradients([8, 9] if ranks == 2 else [8, 9, 0, 1])
    for gradients in run_ranks(tokens_on_a_rank, ranks, ranks, init_group=False):
        for found in gradients.values():
            for ours, theirs in zip(found, exact, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def tokens_on_a_rank(ranks: int) -> dict[tuple[str, bool], list[Tensor]]:
    assert rank() < ranks
    return {
        (reduction, kind): train_tokens(reduction, kind, ranks)
        for reduction in ("mean", "sum")
        for kind in (False, True)
    }


def test_without_a_report_ragged_tokens_weigh_by_sequence() -> None:
    """The default counts samples: what a mean over a micro-batch of one sequence says."""

    class Silent(Tokens):
        def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
            return token_losses(self.layer, indices.tolist()).mean()

    module = Silent("mean", False)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(4), Recorder()]).fit(
        module, datamodule=Batches(torch.arange(10), 1)
    )
    fresh = Tokens("mean", False)
    torch.stack([token_losses(fresh.layer, [i]).mean() for i in (8, 9)]).mean().backward()
    torch.testing.assert_close(module.gradients[-1], fresh.layer.weight.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_report_in_some_micro_batches_only_is_refused() -> None:
    class Forgetful(Tokens):
        def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
            if batch_idx % 2 == 0:
                report_count(self, 3)
            return token_losses(self.layer, indices.tolist()).mean()

    with pytest.raises(ConflictError, match="report_count for some micro-batches"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(4)]).fit(
            Forgetful("mean", False), datamodule=Batches(torch.arange(10), 1)
        )


def test_a_window_without_any_token_has_zero_gradients_not_nan() -> None:
    class Empty(Tokens):
        def training_step(self, indices: Tensor, batch_idx: int) -> Tensor:
            report_count(self, torch.tensor(0))
            return self.layer.weight.sum() * 0.0

    for kind in ("sum", "mean"):
        module = Empty(kind, True)
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(4, loss_reduction=kind), Recorder()]).fit(
            module, datamodule=Batches(torch.arange(10), 1)
        )
        assert all(bool((gradient == 0).all()) for gradient in module.gradients)


def test_a_skipped_training_step_leaves_the_mean_over_the_others() -> None:
    """training_step may return None on one rank; then the window holds one micro-batch less."""

    class Skipping(Regression):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skipping()
    trainer = quiet_trainer(max_steps=1, callbacks=[LargeBatch(8), Recorder()])
    data = regression_data(8)
    trainer.fit(module, datamodule=Batches(data, 4))
    fresh = Regression()
    inputs, targets = next(iter(DataLoader(data, 4)))
    fresh.training_step([inputs, targets], 0).backward()
    torch.testing.assert_close(module.gradients[0], fresh.net[0].weight.grad, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf")])
def test_a_count_that_is_none_is_refused(count: float) -> None:
    with pytest.raises(InvalidOptionError, match="report_count"):
        report_count(nn.Linear(1, 1), count)


def test_gradients_are_normalised_after_unscaling_in_fp16() -> None:
    """16-mixed: GradScaler unscales first; clipping and Lamb come after the window is normalised."""
    from lightning.pytorch.plugins import MixedPrecision

    def train(micro_batch: int) -> Regression:
        module = Regression().float()
        data = [(inputs.float(), targets.float()) for inputs, targets in regression_data(30)]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer = quiet_trainer(
            max_epochs=1,
            callbacks=[LargeBatch(8), Recorder()],
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
            gradient_clip_val=0.1,
        )
        trainer.fit(module, datamodule=Batches(data, micro_batch))
        return module

    for ours, theirs in zip(train(4).gradients, train(8).gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3)  # fp16 products of different micro-batches
