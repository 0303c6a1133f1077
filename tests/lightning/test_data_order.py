"""The order of the data and the seeds of workers: as random as without LargeBatch, and the same again on a resume."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.callbacks.order_seeds import LoaderOrder, OrderSeeds
from lightning_lamb.callbacks.random_states import PrivateRandomness, RandomStates, seed_all
from tests.distributed import rank, run_ranks
from tests.lightning.toys import quiet_trainer

SAMPLES = 16


class Numbers(Dataset):
    """Sample i is [i, a random number]; from torch's generator, Python's and NumPy's in turn."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        draws: list[Callable[[], Any]] = [torch.rand(()).item, random.random, np.random.rand]
        return torch.tensor([float(index), float(draws[index % 3]())], dtype=torch.float64)


class Stream(IterableDataset):
    """The same without an index, in an order that it draws itself."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(SAMPLES).tolist():
            yield Numbers()[index]


class Global(Sampler):
    """A user's sampler: draws one index at a time from the global generator, all of them once."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(SAMPLES))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))

    def __len__(self) -> int:
        return SAMPLES


class Seen(LightningModule):
    """Keeps what it saw, as text, loader by loader."""

    def __init__(self, make: Callable[[], Any], save: Path | None = None, at: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1).double()
        self.make, self.save, self.at = make, save, at
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batches = batch if isinstance(batch, (list, tuple)) else [batch]
        self.seen.append([part.tolist() for part in batches])
        return self.net(batches[0][:, :1]).mean()

    def on_train_batch_end(self, *arguments: Any) -> None:
        if len(self.seen) == self.at:
            self.trainer.save_checkpoint(self.save)

    def configure_optimizers(self) -> Any:
        return Lamb(self.named_parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return self.make()


def run(make: Callable[[], Any], resume: Path | None = None, **options: Any) -> list[Any]:
    """What a training of two epochs sees. Options of Seen: save, at."""
    module = Seen(make, options.pop("save", None), options.pop("at", 0))
    ranks = options.pop("ranks", 1)
    if ranks > 1:
        options |= {"devices": ranks, "strategy": "ddp"}
    large_batch = LargeBatch(8 * ranks, micro_batch_size=4)
    trainer = quiet_trainer(max_epochs=2, callbacks=[large_batch], **options)
    trainer.fit(module, ckpt_path=None if resume is None else str(resume))
    return module.seen


def order(seen: list[Any], loader: int = 0) -> list[int]:
    return [int(sample[0]) for batch in seen for sample in batch[loader]]


def draws(seen: list[Any]) -> list[float]:
    return [sample[1] for batch in seen for sample in batch[0]]


def shuffled(**options: Any) -> DataLoader:
    return DataLoader(Numbers(), 4, shuffle=True, **options)


def test_runs_that_nobody_seeded_differ() -> None:
    """Each run had seed 0 on several ranks, and the initial seed of the process on one."""
    assert order(run(shuffled)) != order(run(shuffled))  # the second fit of a process too
    torch.seed()
    first = run(lambda: shuffled(num_workers=1))
    torch.seed()
    second = run(lambda: shuffled(num_workers=1))
    assert order(first) != order(second)
    assert set(draws(first)).isdisjoint(draws(second))


def test_seeding_does_not_draw_from_the_generator() -> None:
    torch.manual_seed(3)
    before = RandomStates.now()
    torch.manual_seed(3)
    module = Seen(shuffled)
    torch.manual_seed(3)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)], limit_train_batches=2).fit(module)
    first = order(module.seen)
    torch.manual_seed(3)
    module = Seen(shuffled)
    torch.manual_seed(3)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)], limit_train_batches=2).fit(module)
    assert order(module.seen) == first
    assert torch.equal(before.torch_state, torch.Generator().manual_seed(3).get_state())


def short_and_long() -> CombinedLoader:
    short = DataLoader(TensorDataset(torch.arange(8.0, dtype=torch.float64)), 4, shuffle=True, collate_fn=_columns)
    return CombinedLoader([shuffled(), short], "max_size_cycle")


def _columns(samples: list[Any]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])[:, None]


def test_every_pass_over_a_short_loader_has_an_order_of_its_own() -> None:
    """CombinedLoader begins it again in the middle of an epoch: all passes of an epoch were alike."""
    seen = [order(run(short_and_long), 1) for _ in range(3)]
    passes = {tuple(numbers[start : start + 8]) for numbers in seen for start in range(0, 32, 8)}
    assert len(passes) >= 11  # of 12; 8! orders


def test_loaders_of_one_length_have_different_orders() -> None:
    seen = run(lambda: CombinedLoader([shuffled(), shuffled()], "min_size"))
    assert order(seen, 0)[:SAMPLES] != order(seen, 1)[:SAMPLES]
    assert sorted(order(seen, 1)[:SAMPLES]) == list(range(SAMPLES))


# ---- resumed


class OwnIteration(DataLoader):
    """Decides itself what an iteration is."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch + 0


class Again:
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.sampler


class MultiEpochs(DataLoader):
    """The pattern of timm's MultiEpochsDataLoader: one iterator for all epochs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._DataLoader__initialized = False
        self.batches = len(self.batch_sampler)
        self.batch_sampler = Again(self.batch_sampler)
        self._DataLoader__initialized = True
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.batches):
            yield next(self.iterator)


class Plain:
    """Not a DataLoader, shuffles with Python's generator."""

    def __len__(self) -> int:
        return SAMPLES // 4

    def __iter__(self) -> Iterator[Tensor]:
        indices = list(range(SAMPLES))
        random.shuffle(indices)
        for start in range(0, SAMPLES, 4):
            yield torch.stack([Numbers()[index] for index in indices[start : start + 4]])


class ShuffledStateful:
    """Keeps its place and its order; a new pass draws an order when it begins."""

    def __init__(self, eager: bool) -> None:
        self.eager, self.indices, self.place = eager, [], 0

    def __len__(self) -> int:
        return SAMPLES // 4

    def __iter__(self) -> Iterator[Tensor]:
        if self.eager and self.place == 0:
            self.indices = torch.randperm(SAMPLES).tolist()
        return self.batches()

    def batches(self) -> Iterator[Tensor]:
        if not self.eager and self.place == 0:
            self.indices = torch.randperm(SAMPLES).tolist()
        while self.place < SAMPLES:
            start, self.place = self.place, self.place + 4
            if self.place == SAMPLES:
                self.place = 0
            yield torch.stack([Numbers()[index] for index in self.indices[start : start + 4]])
            if self.place == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "indices": list(self.indices)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.indices = state["place"], state["indices"]


def weighted(generator: torch.Generator | None = None) -> DataLoader:
    sampler = WeightedRandomSampler(torch.linspace(1, 2, SAMPLES), SAMPLES, generator=generator)
    return DataLoader(Numbers(), 4, sampler=sampler)


KINDS: dict[str, Callable[[], Any]] = {
    "own iteration": lambda: OwnIteration(Numbers(), 4, shuffle=True),
    "multi-epochs": lambda: MultiEpochs(Numbers(), 4, shuffle=True),
    "not a DataLoader": Plain,
    "stream": lambda: DataLoader(Stream(), 4),
    "stream with a worker": lambda: DataLoader(Stream(), 4, num_workers=1),
    "two workers": lambda: shuffled(num_workers=2),
    "two loaders": lambda: CombinedLoader([shuffled(), shuffled()], "min_size"),
    "short and long": short_and_long,
    "one at a time": lambda: DataLoader(Numbers(), 4, sampler=Global()),
    "weighted, own generator": lambda: weighted(torch.Generator().manual_seed(5)),
    "stateful, shuffles at once": lambda: ShuffledStateful(True),
    "stateful, shuffles late": lambda: ShuffledStateful(False),
}


SLOW = ("two workers", "stream with a worker")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_every_kind_of_loader_sees_the_same_samples_after_a_resume(tmp_path: Path, kind: str) -> None:
    """In the first epoch, at its end and in the second; with what samples draw from the three global generators."""
    for at in (3, 6) if kind in SLOW else (2, 3, 4, 6):
        torch.manual_seed(1)
        whole = run(KINDS[kind], save=tmp_path / f"{at}.ckpt", at=at)
        torch.manual_seed(2)
        resumed = run(KINDS[kind], resume=tmp_path / f"{at}.ckpt")
        assert resumed == whole[at - at % 2 :], at
    assert len(whole) == 8


# ---- ranks


def worker_numbers() -> DataLoader:
    return shuffled(num_workers=1)


def seen_by_a_rank(folder: str) -> dict[str, Any]:
    multiprocessing.current_process()._config["daemon"] = False  # ranks are daemons, which may not have workers
    alone: dict[str, Any] = {"ranks": 2, "use_distributed_sampler": False}
    path = Path(folder)
    found: dict[str, Any] = {}
    torch.seed()
    found["own order"] = run(shuffled, save=path / "own.ckpt", at=3, **alone)
    torch.seed()
    found["own order, resumed"] = run(shuffled, resume=path / "own.ckpt", **alone)
    found["stream"] = run(lambda: DataLoader(Stream(), 4, num_workers=1), **alone, limit_train_batches=2)
    found["wrapped"] = run(lambda: DataLoader(Numbers(), 4, sampler=Global()), ranks=2, save=path / "w.ckpt", at=2)
    torch.seed()
    found["wrapped, resumed"] = run(lambda: DataLoader(Numbers(), 4, sampler=Global()), ranks=2, resume=path / "w.ckpt")
    found["generator"] = run(lambda: shuffled(generator=torch.Generator().manual_seed(5)), **alone)
    return found


@pytest.mark.slow
def test_ranks_see_other_samples_unless_they_were_seeded_alike(tmp_path: Path) -> None:
    """Without a rank in the seed, both ranks saw the same samples, in the same order, with the same augmentation."""
    first, second = run_ranks(seen_by_a_rank, 2, str(tmp_path), init_group=False, timeout=500)
    for kind in ("own order", "stream"):
        assert order(first[kind])[:8] != order(second[kind])[:8], kind
        assert set(draws(first[kind])).isdisjoint(draws(second[kind])), kind
    for found in (first, second):
        assert found["own order, resumed"] == found["own order"][2:]
        assert found["wrapped, resumed"] == found["wrapped"][2:]
    # A part of one order for each rank: all samples once an epoch.
    together = order(first["wrapped"])[: SAMPLES // 2] + order(second["wrapped"])[: SAMPLES // 2]
    assert sorted(together) == list(range(SAMPLES))
    # As without LargeBatch: the user gave both ranks one seed.
    assert order(first["generator"]) == order(second["generator"])
    saved = torch.load(tmp_path / "own.ckpt", weights_only=True)["lightning_lamb_position"]
    assert len(set(saved["order_seed"])) == 2


def seeds_of_a_rank() -> tuple[list[OrderSeeds], list[int]]:
    def gather(seed: int) -> list[int]:
        seeds: list[Any] = [None, None]
        torch.distributed.all_gather_object(seeds, seed)
        return seeds

    torch.seed()
    unseeded = OrderSeeds.of({}, rank(), gather)
    torch.manual_seed(3)
    alike = OrderSeeds.of({}, rank(), gather)
    found = [unseeded, alike]
    found += [
        OrderSeeds.of(saved, rank(), gather) for saved in (unseeded.save(), {"order_seed": 5}, {"order_seed": [5]})
    ]
    orders = [LoaderOrder(seeds, 0, lambda: 0, 2) for seeds in found]
    return found, [order.shuffle_seed() for order in orders if order.begin()]


def test_every_rank_has_a_seed_of_its_own_and_all_know_them() -> None:
    """So a checkpoint holds them, also one that a single rank saves while an exception is on its way.

    A checkpoint of one rank continues on two, which must not share a seed; so does one from the time of one seed.
    """
    (first, shuffles), (second, other_shuffles) = run_ranks(seeds_of_a_rank, 2)
    assert first[0].own != second[0].own
    assert first[0].of_rank == second[0].of_rank == [first[0].own, second[0].own]
    assert first[1].own == second[1].own
    assert (first[2].own, second[2].own) == (first[0].own, second[0].own)
    for one_seed in (3, 4):
        assert first[one_seed].own == 5 != second[one_seed].own
        assert second[one_seed].of_rank == [5, second[one_seed].own]
    assert [a == b for a, b in zip(shuffles, other_shuffles, strict=True)] == [False, True, False, False, False]


# ---- the states of generators


def everyone_draws() -> list[float]:
    values = [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand()]  # noqa: NPY002
    return [*map(float, values), float(torch.rand(()))]


def test_states_are_restored_with_a_second_normal_number_that_lies_ready() -> None:
    """It is not among the words of a Mersenne twister, which are compared to see what has moved."""
    states: RandomStates | None = None
    for draw in (lambda: None, lambda: random.gauss(0, 1), np.random.normal, everyone_draws, np.random.rand):
        draw()
        states = RandomStates.now(earlier=states)
        expected = [everyone_draws() for _ in range(3)]
        for _ in range(2):
            states.restore()
            assert [everyone_draws() for _ in range(3)] == expected


def test_private_random_numbers_leave_the_others_alone() -> None:
    seed_all(1)
    expected = [everyone_draws() for _ in range(6)]
    seed_all(2)
    private_expected = [everyone_draws() for _ in range(6)]
    seed_all(1)
    private, found = PrivateRandomness(2), []
    for number in range(6):
        assert everyone_draws() == expected[number]
        with private():
            found.append(everyone_draws())
    assert found == private_expected
