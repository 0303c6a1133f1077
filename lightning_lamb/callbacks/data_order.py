"""The order of the training data as a function of the epoch, so that a resumed run can continue in the middle of it.

An ordinary DataLoader that shuffles draws its order from the global random numbers when an epoch begins, and cannot
begin in the middle. The loaders made here do both: the order depends on a seed and the epoch alone, on any number of
ranks, and the micro-batches that were seen already are skipped where only their indices are drawn, not their samples.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_lamb.callbacks.random_states import PrivateRandomness, TrainingRandomness


class DataOrder:
    """Which order the training data has, and where in it training is.

    Args:
        randomness: training's stream, restored before each fetch.
        epoch: tells the present epoch.
        seed: decides the order; None: of PL_GLOBAL_SEED (seed_everything), or else of torch's generator on one rank.
        ranks: data-parallel ranks.
    """

    def __init__(self, randomness: TrainingRandomness, epoch: Callable[[], int], seed: int | None, ranks: int) -> None:
        self.randomness = randomness
        self.epoch = epoch
        self.seed_is_restored = seed is not None
        if seed is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0 if ranks > 1 else torch.initial_seed() % 2**32))
        self.seed = seed
        self._skip = (-1, 0)
        self._given: dict[int, tuple[torch.Generator, int]] = {}  # keeps the generators, whose ids are the keys

    def begin_at(self, epoch: int, micro_batches: int) -> None:
        """Skips the first micro-batches of one epoch."""
        self._skip = (epoch, micro_batches)

    def skip(self) -> int:
        """How many micro-batches of the present epoch are skipped."""
        epoch, micro_batches = self._skip
        return micro_batches if epoch == self.epoch() else 0

    def private(self) -> PrivateRandomness:
        """Random numbers that depend on seed and epoch alone."""
        return PrivateRandomness(self.seed * 1_000_003 + self.epoch())

    def seed_generator_of(self, owner: Any) -> None:
        """Gives the user's own generator of a sampler or loader the same numbers in every run of an epoch.

        They depend on the seed that the user gave it. A generator tells its last seed only, and a loader shares its
        generator with its sampler: so what was given is kept from the first time.
        """
        generator = getattr(owner, "generator", None)
        if generator is None:
            return
        _, given = self._given.setdefault(id(generator), (generator, generator.initial_seed()))
        generator.manual_seed((given + self.seed + self.epoch()) % 2**63)

    def follow(self, loader: Any) -> None:
        """Takes the seed of a DistributedSampler, or gives it the one of the checkpoint."""
        sampler = inner_sampler(loader)
        if isinstance(sampler, DistributedSampler) and sampler.shuffle:
            if self.seed_is_restored:
                sampler.seed = self.seed
            else:
                self.seed = sampler.seed


def is_stateful(loader: Any) -> bool:
    """Whether a loader keeps its position itself."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def inner_sampler(loader: Any) -> Any:
    """The sampler that decides the order of samples."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)


def resumable(loader: Any, order: DataOrder, *, skips: bool) -> Any:
    """A DataLoader with the same data, whose order is ``order``'s; any other loader is returned as it is.

    Args:
        loader: what the Trainer would use.
        order: shared by all loaders of a ``fit``.
        skips: it skips what was seen by itself.
    """
    if not isinstance(loader, DataLoader) or is_stateful(loader):
        return loader
    if isinstance(loader, ResumableLoader):
        return loader
    kind = type(loader)
    # Of a subclass of the very class, so that isinstance and attributes stay what the user's code expects.
    made: Any = object.__new__(type(kind.__name__, (ResumableLoader, kind), {"__doc__": kind.__doc__}))
    # Lightning has made an iterator already, and persistent workers would go on with the sampler that it knows.
    made.__dict__.update(loader.__dict__, _iterator=None)
    made.order, made.skips = order, skips
    order.follow(made)
    return made


class ResumableLoader:
    """What `resumable` puts before a DataLoader's class."""

    order: DataOrder
    skips: bool

    @property
    def _index_sampler(self) -> Any:
        """The sampler that torch's iterators draw from (of batches, or of samples without batching)."""
        inner = super()._index_sampler  # type: ignore[misc]
        if isinstance(self.dataset, IterableDataset):  # type: ignore[attr-defined]
            return inner
        return OrderedIndices(inner, inner_sampler(self), self.order, skips=self.skips)

    def __iter__(self) -> Iterator[Any]:
        """One pass in the present epoch's order, from where training is."""
        order = self.order
        # With workers, indices are drawn now, before Lightning tells samplers the epoch.
        for sampler in (getattr(self, "sampler", None), inner_sampler(self)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(order.epoch())
        order.seed_generator_of(self)
        with order.private()():  # the seed of the workers
            inner = super().__iter__()  # type: ignore[misc]
        if isinstance(self.dataset, IterableDataset):  # type: ignore[attr-defined]
            if self.skips:
                with order.private()():
                    for _ in range(order.skip()):
                        next(inner, None)
            return inner
        return Fetches(inner, order.randomness)


class Fetches:
    """A DataLoader's iterator whose samples draw from training's random numbers."""

    def __init__(self, inner: Iterator[Any], randomness: TrainingRandomness) -> None:
        self._inner, self._randomness = inner, randomness

    def __iter__(self) -> Fetches:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch."""
        self._randomness.enter()
        return next(self._inner)

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return len(self._inner)  # type: ignore[arg-type]


class OrderedIndices:
    """A (batch) sampler in the order of an epoch, without what was seen.

    Args:
        sampler: gives indices, or lists of them.
        innermost: gives the order of samples.
        order: tells epoch, seed and what to skip.
        skips: skip by itself.
    """

    def __init__(self, sampler: Any, innermost: Any, order: DataOrder, *, skips: bool) -> None:
        self._sampler, self._innermost, self._order, self._skips = sampler, innermost, order, skips

    def __len__(self) -> int:
        """Of a whole pass: Lightning compares it with all micro-batches of the epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        """Draws the order of the present epoch."""
        skipped = self._order.skip() if self._skips else 0
        return self._draw(skipped, self._order.private(), self._order.seed + self._order.epoch())

    def _draw(self, skipped: int, private: PrivateRandomness, seed: int) -> Iterator[Any]:
        inner, nothing = iter(self._sampler), object()
        self._order.seed_generator_of(self._innermost)
        with private(), _shuffled_by(self._innermost, seed):
            drawn = next(inner, nothing)
        # torch's own samplers draw their order at once; others may draw from the global generators each time.
        place: Any = contextlib.nullcontext if self._draws_at_once else private
        position = 0
        while drawn is not nothing:
            position += 1
            if position > skipped:
                yield drawn
            with place():
                drawn = next(inner, nothing)

    @property
    def _draws_at_once(self) -> bool:
        samplers = (SequentialSampler, RandomSampler, DistributedSampler)
        return type(self._innermost) in samplers and type(self._sampler) in (BatchSampler, *samplers)


@contextlib.contextmanager
def _shuffled_by(sampler: Any, seed: int) -> Iterator[None]:
    """Has a RandomSampler shuffle as a DistributedSampler with this seed and epoch would, on its first draw.

    So the order of the data is the same on one rank and on several, unless the sampler has a generator of its own.
    """
    if not isinstance(sampler, RandomSampler) or sampler.generator is not None:
        yield
        return
    sampler.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        sampler.generator = None
