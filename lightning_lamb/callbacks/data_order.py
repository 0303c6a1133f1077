"""The order of the training data as a function of the epoch, so that a resumed run can continue in the middle of it.

An ordinary DataLoader that shuffles draws its order from the global random numbers when an epoch begins, and cannot
begin in the middle. The loaders made here do both: the order depends on seeds and the epoch alone (see `order_seeds`),
and the micro-batches that were seen already are skipped where only their indices are drawn, not their samples. Loaders
that do not leave the order to a sampler are iterated with random numbers of their own (see `data_streams`).
"""

from __future__ import annotations

import contextlib
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

from lightning_lamb.callbacks.data_streams import Fetches, PrivateFetches, continued, is_stateful, streamed
from lightning_lamb.callbacks.order_seeds import LoaderOrder, OrderSeeds
from lightning_lamb.callbacks.random_states import PrivateRandomness, TrainingRandomness
from lightning_lamb.callbacks.worker_seeds import seeded, worker_seeding


class DataOrder:
    """Which order the training data has, and where in it training is.

    Args:
        randomness: training's stream, restored before each fetch.
        epoch: tells the present epoch.
        seeds: decide the order.
        ranks: data-parallel ranks.
    """

    def __init__(self, randomness: TrainingRandomness, epoch: Callable[[], int], seeds: OrderSeeds, ranks: int) -> None:
        self.randomness = randomness
        self.epoch = epoch
        self.seeds = seeds
        self.ranks = ranks
        self._skip = (-1, 0)

    def begin_at(self, epoch: int, micro_batches: int) -> None:
        """Skips the first micro-batches of one epoch."""
        self._skip = (epoch, micro_batches)

    def skip(self) -> int:
        """How many micro-batches of the present epoch are skipped."""
        epoch, micro_batches = self._skip
        return micro_batches if epoch == self.epoch() else 0

    def of_loader(self, index: int) -> LoaderOrder:
        """The seeds of one loader."""
        return LoaderOrder(self.seeds, index, self.epoch, self.ranks)


def inner_sampler(loader: Any) -> Any:
    """The sampler that decides the order of samples."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)


def wrapped_sampler(sampler: Any) -> Any:
    """The user's sampler inside Lightning's DistributedSamplerWrapper, which takes each rank's part of it; or None."""
    inside = getattr(sampler, "dataset", None)
    return getattr(inside, "_sampler", None) if isinstance(sampler, DistributedSampler) else None


def skips_by_index(loader: Any) -> bool:
    """Whether a loader leaves the order to a sampler, so that what was seen can be skipped without loading it."""
    kind = type(loader)
    names = ("__iter__", "_get_iterator", "_index_sampler")
    return issubclass(kind, ResumableLoader) or (
        issubclass(kind, DataLoader) and all(getattr(kind, name) is getattr(DataLoader, name) for name in names)
    )


def resumable(loader: Any, index: int, order: DataOrder, *, skips: bool) -> Any:
    """A loader with the same data, whose order is ``order``'s.

    Args:
        loader: what the Trainer would use.
        index: its place among the loaders.
        order: shared by all loaders of a ``fit``.
        skips: it skips what was seen by itself.
    """
    if isinstance(loader, ResumableLoader):
        return loader
    if is_stateful(loader):
        return continued(loader, order.of_loader(index), order.randomness)
    if not skips_by_index(loader):
        return streamed(loader, order.of_loader(index))
    kind = type(loader)
    # Of a subclass of the very class, so that isinstance and attributes stay what the user's code expects.
    made: Any = object.__new__(type(kind.__name__, (ResumableLoader, kind), {"__doc__": kind.__doc__}))
    # Lightning has made an iterator already, and persistent workers would go on with the sampler that it knows.
    made.__dict__.update(loader.__dict__, _iterator=None)
    made.order, made.part, made.skips = order, order.of_loader(index), skips
    made.part.follow(inner_sampler(made))
    return made


class ResumableLoader:
    """What `resumable` puts before a DataLoader's class."""

    order: DataOrder
    part: LoaderOrder
    skips: bool

    @property
    def _index_sampler(self) -> Any:
        """The sampler that torch's iterators draw from (of batches, or of samples without batching)."""
        inner = super()._index_sampler  # type: ignore[misc]
        if isinstance(self.dataset, IterableDataset):  # type: ignore[attr-defined]
            return inner
        seeding = worker_seeding(self)
        return OrderedIndices(inner, inner_sampler(self), self.order, self.part, skips=self.skips, seeding=seeding)

    def __iter__(self) -> Iterator[Any]:
        """One pass in the present epoch's order, from where training is."""
        order, part, this = self.order, self.part, self.part.begin()
        # With workers, indices are drawn now, before Lightning tells samplers the epoch.
        for sampler in (getattr(self, "sampler", None), inner_sampler(self)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(order.epoch())
        part.seed_generator(getattr(self, "generator", None))
        private = PrivateRandomness(part.stream_seed())
        with private():  # the seed of the workers
            inner = super().__iter__()  # type: ignore[misc]
        if not isinstance(self.dataset, IterableDataset):  # type: ignore[attr-defined]
            return Fetches(inner, order.randomness.enter, this)
        # What an iterable dataset draws in this process belongs to the pass, and is drawn again when it is repeated.
        iterator = PrivateFetches(inner, private, this)
        if self.skips and this.number == 0:
            for _ in range(order.skip()):
                next(iterator, None)
        return iterator


class OrderedIndices:
    """A (batch) sampler in the order of an epoch, without what was seen.

    Args:
        sampler: gives indices, or lists of them.
        innermost: gives the order of samples.
        order: tells the epoch and what to skip.
        part: this loader's seeds.
        skips: skip by itself.
        seeding: how workers are seeded, see `worker_seeding`.
    """

    def __init__(
        self,
        sampler: Any,
        innermost: Any,
        order: DataOrder,
        part: LoaderOrder,
        *,
        skips: bool,
        seeding: tuple[int, ...] | None = None,
    ) -> None:
        self._sampler, self._innermost, self._order, self._part = sampler, innermost, order, part
        self._skips, self._seeding = skips, seeding

    def __len__(self) -> int:
        """Of a whole pass: Lightning compares it with all micro-batches of the epoch."""
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        """Draws the order of the present pass."""
        part = self._part
        skipped = self._order.skip() if self._skips and part.current.number == 0 else 0
        # Lightning's wrapper gives each rank a part of one order, which all ranks must draw alike.
        private = PrivateRandomness(part.stream_seed(shared=wrapped_sampler(self._innermost) is not None))
        seed = part.shuffle_seed() if _shuffles_globally(self._innermost) else 0
        seeds = None if self._seeding is None else (part.stream_seed(), *self._seeding)
        return self._draw(skipped, private, seed, seeds)

    def _draw(
        self, skipped: int, private: PrivateRandomness, seed: int, seeds: tuple[int, ...] | None
    ) -> Iterator[Any]:
        inner, nothing = iter(self._sampler), object()
        for sampler in (self._innermost, wrapped_sampler(self._innermost)):
            self._part.seed_generator(getattr(sampler, "generator", None))
        with private(), _shuffled_by(self._innermost, seed):
            drawn = next(inner, nothing)
        # torch's own samplers draw their order at once; others may draw from the global generators each time.
        place: Any = contextlib.nullcontext if self._draws_at_once else private
        position = 0
        while drawn is not nothing:
            position += 1
            if position > skipped:
                yield seeded(drawn, seeds, position)
            with place():
                drawn = next(inner, nothing)

    @property
    def _draws_at_once(self) -> bool:
        samplers = (SequentialSampler, RandomSampler, DistributedSampler)
        return type(self._innermost) in samplers and type(self._sampler) in (BatchSampler, *samplers)


def _shuffles_globally(sampler: Any) -> bool:
    """Whether a sampler shuffles with a seed from the global generator."""
    return isinstance(sampler, RandomSampler) and sampler.generator is None


@contextlib.contextmanager
def _shuffled_by(sampler: Any, seed: int) -> Iterator[None]:
    """Has a RandomSampler without a generator of its own shuffle by a seed, on its first draw."""
    if not _shuffles_globally(sampler):
        yield
        return
    sampler.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        sampler.generator = None
