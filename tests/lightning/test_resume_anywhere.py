"""Checkpoints of unusual moments and of unusual objects: they continue exactly, or a warning says why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lamb import LambMixin, LargeBatch
from lightning_lamb.callbacks.window_buffers import SMALL, WindowBuffers
from lightning_lamb.errors import PlanError
from tests.distributed import rank, run_ranks
from tests.lightning.test_resume import Stateful, StatefulData
from tests.lightning.toys import quiet_trainer, regression_data, weights

SAMPLES = 32  # 16 micro-batches of 2, 4 windows of 8
UNRELIABLE = "You're resuming from a checkpoint that ended before the epoch ended"


class Model(LambMixin, LightningModule):
    lamb_lr = 0.01
    lamb_schedule = {"warmup_steps": 6}

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2)).double()
        self.seen: list[float] = []
        self.rates: list[float] = []
        self.save_in_step: tuple[int, Path] | None = None
        self.raise_in_step: tuple[int, BaseException] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.seen.append(float(inputs[0, 0]))
        return (self.net(inputs) - targets).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(1)

    test_step = validation_step

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        if self.trainer.fit_loop._should_accumulate():
            return
        self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))
        steps = self.trainer.global_step + 1  # Lightning has not counted the present one
        if self.save_in_step is not None and steps == self.save_in_step[0]:
            self.trainer.save_checkpoint(self.save_in_step[1])
        if self.raise_in_step is not None and steps == self.raise_in_step[0]:
            raise self.raise_in_step[1]


class Constant(Model):
    """Without a schedule, whose length would be another one in a longer training."""

    lamb_schedule = None


def loader(**options: Any) -> DataLoader:
    return DataLoader(regression_data(SAMPLES), 2, **({"shuffle": True} | options))


def train(
    module: Model | None = None,
    data: Any = None,
    resume: Path | None = None,
    callbacks: list[Callback] | None = None,
    large_batch: LargeBatch | None = None,
    **options: Any,
) -> tuple[Model, Trainer]:
    module = Model() if module is None else module
    if callbacks is None:
        callbacks = [large_batch or LargeBatch(8, micro_batch_size=2)]
    trainer = quiet_trainer(**({"max_epochs": 2, "num_sanity_val_steps": 0} | options), callbacks=callbacks)
    trainer.fit(module, loader() if data is None else data, ckpt_path=None if resume is None else str(resume))
    return module, trainer


def assert_same_end(resumed: Model, whole: Model) -> None:
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert resumed.rates == whole.rates[len(whole.rates) - len(resumed.rates) :]
    state = whole.state_dict()
    assert [name for name, value in resumed.state_dict().items() if not torch.equal(value, state[name])] == []


@pytest.mark.parametrize("step", [2, 4, 5], ids=["in an epoch", "the last of an epoch", "in the second epoch"])
def test_a_window_is_not_applied_twice_when_saved_right_after_its_step(tmp_path: Path, step: int) -> None:
    """Lightning had not counted the step; the checkpoint held its weights and said that the window was ahead.

    The schedule had not moved either: the resumed run does it.
    """
    torch.manual_seed(1)
    whole, _ = train()
    module = Model()
    module.save_in_step = (step, tmp_path / "a.ckpt")
    torch.manual_seed(1)
    train(module)
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["global_step"] == step
    torch.manual_seed(2)
    resumed, trainer = train(resume=tmp_path / "a.ckpt")
    assert len(resumed.seen) == 4 * (8 - step)
    assert trainer.global_step == 8
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("first", [True, False], ids=["LargeBatch first", "LargeBatch last"])
def test_an_exception_after_a_step_leaves_a_checkpoint_that_continues_exactly(tmp_path: Path, first: bool) -> None:
    torch.manual_seed(1)
    whole, _ = train()
    module = Model()
    module.raise_in_step = (3, OSError("disk full"))
    callbacks = [LargeBatch(8, micro_batch_size=2), OnExceptionCheckpoint(tmp_path)]
    torch.manual_seed(1)
    with pytest.raises(OSError, match="disk full"):
        train(module, callbacks=callbacks if first else callbacks[::-1], enable_checkpointing=True)
    torch.manual_seed(2)
    resumed, _ = train(resume=tmp_path / "on_exception.ckpt")
    assert len(resumed.seen) == 4 * 5
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("between", ["test", "validate"])
def test_the_position_is_saved_after_another_loop_has_run(tmp_path: Path, between: str) -> None:
    torch.manual_seed(1)
    whole, _ = train(Constant())
    torch.manual_seed(1)
    module, trainer = train(Constant(), max_epochs=1)
    getattr(trainer, between)(module, loader(shuffle=False), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(2)
    resumed, _ = train(Constant(), resume=tmp_path / "a.ckpt")
    assert_same_end(resumed, whole)


def test_a_longer_training_goes_on_in_the_epoch_that_max_steps_cut_short(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole, _ = train(Constant())
    torch.manual_seed(1)
    _, trainer = train(Constant(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(2)
    resumed, _ = train(Constant(), resume=tmp_path / "a.ckpt")
    assert len(resumed.seen) == 4 * 5
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("first", [True, False], ids=["LargeBatch first", "LargeBatch last"])
def test_weight_averaging_resumes_inside_a_window_in_any_order_of_callbacks(tmp_path: Path, first: bool) -> None:
    """WeightAveraging swaps the model that trains for its average: LargeBatch wrote running statistics into that."""

    def callbacks() -> list[Callback]:
        both = [LargeBatch(8, micro_batch_size=2), EMAWeightAveraging(decay=0.9)]
        return [*(both if first else both[::-1]), SaveAt(6, tmp_path / "a.ckpt")]

    torch.manual_seed(1)
    whole, _ = train(callbacks=callbacks())
    torch.manual_seed(2)
    resumed, _ = train(resume=tmp_path / "a.ckpt", callbacks=callbacks())
    assert len(resumed.seen) == 32 - 4
    assert_same_end(resumed, whole)


class SaveAt(Callback):
    """Saves after so many micro-batches of the run."""

    def __init__(self, micro_batches: int, path: Path) -> None:
        self.left, self.path = micro_batches, path

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


# ---- with and without LargeBatch


def saved_by_stranger(path: Path, micro_batches: int, accumulation: int = 1) -> None:
    train(callbacks=[SaveAt(micro_batches, path)], accumulate_grad_batches=accumulation)


def test_a_strangers_checkpoint_continues_where_a_window_begins(tmp_path: Path) -> None:
    """Windows began at its micro-batch, whatever that was: the first one was short."""
    saved_by_stranger(tmp_path / "a.ckpt", 8)
    with pytest.warns(UserWarning, match="no random numbers, so the order of shuffled data is another one"):
        resumed, trainer = train(resume=tmp_path / "a.ckpt", large_batch=LargeBatch(8, on_plan_change="adopt"))
    assert len(resumed.seen) == 32 - 8
    assert trainer.global_step == 8 + 6


@pytest.mark.parametrize("micro_batches", [6, 22])
def test_a_strangers_checkpoint_from_inside_a_window_is_refused(tmp_path: Path, micro_batches: int) -> None:
    saved_by_stranger(tmp_path / "a.ckpt", micro_batches)
    with pytest.raises(PlanError, match=r"after 6 micro-batches of epoch [01].*a second time"):
        train(resume=tmp_path / "a.ckpt", large_batch=LargeBatch(8))
    adopting = LargeBatch(8, on_plan_change="adopt")
    resumed, _ = train(resume=tmp_path / "a.ckpt", large_batch=adopting)
    assert len(resumed.seen) == 32 - micro_batches + 2


def test_a_stranger_that_max_steps_stopped_in_an_epoch_is_not_at_its_end(tmp_path: Path) -> None:
    """Nothing was left to train on, without a word."""
    _, trainer = train(Constant(), callbacks=[], max_steps=6)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(PlanError, match="after 6 micro-batches of epoch 0"):
        train(Constant(), resume=tmp_path / "a.ckpt", large_batch=LargeBatch(8), max_epochs=1)


def test_lightning_alone_continues_our_checkpoint_where_the_window_began(tmp_path: Path) -> None:
    """The counters said otherwise than the running statistics and the loaders' states."""
    train(callbacks=[LargeBatch(8, micro_batch_size=2), SaveAt(6, tmp_path / "a.ckpt")])
    counters = torch.load(tmp_path / "a.ckpt", weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert counters["current"]["processed"] == 4
    resumed, trainer = train(resume=tmp_path / "a.ckpt", callbacks=[], accumulate_grad_batches=4)
    assert len(resumed.seen) == 32 - 4
    assert trainer.global_step == 8


@pytest.mark.parametrize("callbacks", [[], [LargeBatch(8, micro_batch_size=2)]], ids=["alone", "LargeBatch"])
def test_a_schedule_that_asks_for_its_length_does_not_cost_a_loader_its_position(
    tmp_path: Path, callbacks: list[Callback]
) -> None:
    """LambMixin made the loader before the checkpoint was restored: Lightning #20550."""
    accumulation: dict[str, Any] = {} if callbacks else {"accumulate_grad_batches": 4}
    whole, _ = train(data=StatefulData(), callbacks=[*callbacks, SaveAt(8, tmp_path / "a.ckpt")], **accumulation)
    resumed, _ = train(data=StatefulData(), callbacks=callbacks, resume=tmp_path / "a.ckpt", **accumulation)
    assert len(resumed.seen) == 24
    assert resumed.seen == whole.seen[8:]


# ---- what is said


class OwnGenerator(Sampler):
    """A sampler whose order depends on a generator of its own, which no checkpoint holds."""

    def __init__(self) -> None:
        self.generator_of_mine = np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator_of_mine.permutation(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


class CountsPasses(DataLoader):
    """A loader whose order depends on how often it was iterated."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes = self.passes + 1
        batches = list(super().__iter__())
        return iter(batches[self.passes :] + batches[: self.passes])


class Drifting(Dataset):
    """A dataset that augments with a generator of its own."""

    def __init__(self) -> None:
        self.data, self.noise = regression_data(SAMPLES), np.random.default_rng(0)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        inputs, targets = self.data[index]
        return inputs + self.noise.normal(), targets


INEXACT: dict[str, tuple[Callable[[], Any], str]] = {
    "sampler": (lambda: loader(shuffle=False, sampler=OwnGenerator()), "OwnGenerator.generator_of_mine changes"),
    "loader": (lambda: CountsPasses(regression_data(SAMPLES), 2), "CountsPasses.passes changes"),
    "dataset": (lambda: DataLoader(Drifting(), 2), "Drifting.noise changes"),
}


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.parametrize("micro_batches", [6, 20])
def test_a_resume_that_is_not_exact_says_so_once_and_names_why(tmp_path: Path, kind: str, micro_batches: int) -> None:
    make, message = INEXACT[kind]
    train(data=make(), callbacks=[LargeBatch(8, micro_batch_size=2), SaveAt(micro_batches, tmp_path / "a.ckpt")])
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(data=make(), resume=tmp_path / "a.ckpt")
    texts = [str(warning.message) for warning in found]
    assert len([text for text in texts if message in text]) == 1
    assert any(UNRELIABLE in text for text in texts)


@pytest.mark.parametrize("exact", [True, False])
def test_lightning_calls_a_resume_unreliable_only_where_it_is(tmp_path: Path, exact: bool) -> None:
    large_batch = LargeBatch(8, micro_batch_size=2, exact_resume=exact)
    train(callbacks=[large_batch, SaveAt(6, tmp_path / "a.ckpt")])
    for _ in range(2):  # the filter does not stay
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            train(resume=tmp_path / "a.ckpt", large_batch=LargeBatch(8, micro_batch_size=2, exact_resume=exact))
        assert any(UNRELIABLE in str(warning.message) for warning in found) is not exact
        assert not [str(warning.message) for warning in found if "LargeBatch" in str(warning.message)] or not exact
        assert not [entry for entry in warnings.filters if entry[1] is not None and "You're" in entry[1].pattern]


# ---- what is copied


def test_only_persistent_buffers_that_may_have_moved_are_copied() -> None:
    """All were, in every window, also those that no checkpoint holds: 66 ms for 120 MB."""
    module = nn.BatchNorm1d(3)
    module.register_buffer("large", torch.zeros(SMALL + 1))
    module.register_buffer("cache", torch.zeros(8), persistent=False)
    buffers = WindowBuffers()
    buffers.find(module)
    buffers.keep()
    assert "cache" not in buffers._copies
    copy = buffers._copies["large"]
    copy.fill_(5.0)  # to see whether it is written again
    module(torch.randn(4, 3))
    buffers.keep()
    assert float(copy[0]) == 5.0
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    module.large.add_(1.0)
    buffers.keep()
    assert float(copy[0]) == 1.0
    module(torch.randn(4, 3))
    module.large = torch.full((SMALL + 1,), 3.0)
    checkpoint = {"state_dict": dict(module.state_dict())}
    buffers.write(checkpoint)
    assert torch.equal(checkpoint["state_dict"]["running_mean"], kept["running_mean"])
    assert float(checkpoint["state_dict"]["large"][0]) == 1.0
    buffers.keep()
    assert float(buffers._copies["large"][0]) == 3.0


# ---- ranks


class RankData(LightningDataModule):
    """Every rank has another loader with a state: its data begins elsewhere."""

    def train_dataloader(self) -> Stateful:
        made = Stateful(2, 0, 1)
        made.data = regression_data(32, seed=self.trainer.global_rank)
        made.offset = self.trainer.global_rank
        made.state_dict = lambda: {"position": made.position, "rank": made.offset}  # type: ignore[method-assign]
        return made


def resume_on_a_rank(folder: str) -> tuple[Any, Any, int]:
    path = Path(folder) / "a.ckpt"
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 1}
    large_batch = LargeBatch(16, micro_batch_size=2)
    whole, _ = train(data=RankData(), callbacks=[large_batch, SaveAt(6, path)], **options)
    checkpoint = torch.load(path, weights_only=True)
    loader_states = checkpoint["lightning_lamb_position"]["loader_states"]
    resumed, _ = train(data=RankData(), large_batch=LargeBatch(16, micro_batch_size=2), resume=path, **options)
    same = all(torch.equal(a, weights(whole)[name]) for name, a in weights(resumed).items())
    return resumed.seen == whole.seen[4:] and same, loader_states, rank()


@pytest.mark.slow
def test_every_rank_gets_the_states_of_its_own_loaders(tmp_path: Path) -> None:
    """Lightning's checkpoint holds those of rank 0."""
    for same, states, index in run_ranks(resume_on_a_rank, 2, str(tmp_path), init_group=False, timeout=400):
        assert same
        assert [state["rank"] for (state,) in states] == [0, 1], index
