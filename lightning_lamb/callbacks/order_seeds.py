"""The seeds that decide the order of the training data, and the passes over a loader that they belong to.

Whatever a rank draws for itself depends on its own seed, as it would on its own generators without LargeBatch: ranks
that were seeded apart, or not at all, see other samples. What all ranks must draw alike depends on a shared seed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lightning_lamb.callbacks.random_states import mixed_seed, present_seed


@dataclasses.dataclass
class OrderSeeds:
    """What a checkpoint keeps of the order of the data.

    Attributes:
        own: this rank's seed.
        of_rank: every rank's.
        shuffle: by loader, what a DistributedSampler shuffles with, or a RandomSampler on one rank.
        generators: by loader, the seed that the user gave to its generator.
        is_restored: they come from a checkpoint.
        is_single: they come from a checkpoint that held one seed for all ranks, as once they did.
    """

    own: int
    of_rank: list[int]
    shuffle: list[int | None] = dataclasses.field(default_factory=list)
    generators: list[int | None] = dataclasses.field(default_factory=list)
    is_restored: bool = False
    is_single: bool = False

    @classmethod
    def of(cls, saved: dict[str, Any], rank: int, gather: Callable[[int], list[int]]) -> OrderSeeds:
        """Those of a checkpoint, or new ones from the present state of torch's generator, which does not move.

        Args:
            saved: what `save` returned, or {}.
            rank: this one.
            gather: brings every rank's number to every rank; called once.
        """
        seeds = saved.get("order_seed")
        if seeds is None:
            of_rank = gather(present_seed())
            return cls(of_rank[rank], of_rank)
        if isinstance(seeds, int):
            own = mixed_seed(seeds, rank) if rank else seeds
            return cls(own, gather(own), [seeds], is_restored=True, is_single=True)
        own = seeds[rank] if rank < len(seeds) else mixed_seed(seeds[0], rank)
        given = list(saved.get("shuffle_seeds", [])), list(saved.get("generator_seeds", []))
        return cls(own, gather(own), *given, is_restored=True)

    @property
    def shared(self) -> int:
        """One seed for all ranks."""
        return self.of_rank[0]

    def save(self) -> dict[str, Any]:
        """Plain values."""
        return {"order_seed": self.of_rank, "shuffle_seeds": self.shuffle, "generator_seeds": self.generators}


def _entry(values: list[int | None], index: int) -> int | None:
    """The value of a loader, None where there is none yet."""
    return values[index] if index < len(values) else None


def _enter(values: list[int | None], index: int, value: int) -> None:
    """Keeps the value of a loader."""
    values.extend([None] * (index + 1 - len(values)))
    values[index] = value


@dataclasses.dataclass
class Pass:
    """One pass over a loader.

    Attributes:
        epoch: of the training.
        number: 0 for the first of an epoch; CombinedLoader begins a short loader several times.
        is_finished: the loader gave all it had. A pass that was begun and forgotten does not count.
    """

    epoch: int
    number: int
    is_finished: bool = False


class LoaderOrder:
    """The seeds of one loader, pass by pass.

    Args:
        seeds: of all loaders.
        index: of this one.
        epoch: tells the present epoch.
        ranks: data-parallel ranks.
    """

    def __init__(self, seeds: OrderSeeds, index: int, epoch: Callable[[], int], ranks: int) -> None:
        self._seeds, self._index, self._epoch, self._ranks = seeds, index, epoch, ranks
        self.current = Pass(-1, 0)

    def begin(self) -> Pass:
        """A pass begins."""
        epoch, last = self._epoch(), self.current
        number = 0 if last.epoch != epoch else last.number + last.is_finished
        self.current = Pass(epoch, number)
        return self.current

    def stream_seed(self, *, shared: bool = False) -> int:
        """Seed of what is drawn from the global generators in the present pass.

        Args:
            shared: the same on all ranks.
        """
        seed = self._seeds.shared if shared else self._seeds.own
        epoch, number = self.current.epoch, self.current.number
        if self._seeds.is_single and self._index == number == 0:
            return seed * 1_000_003 + epoch
        return mixed_seed(seed, self._index, epoch, number)

    def shuffle_seed(self) -> int:
        """Seed of a RandomSampler without a generator, in the present pass.

        On one rank its first pass is that of a DistributedSampler with the seed of PL_GLOBAL_SEED (seed_everything), so
        that the order stays the same on more ranks; on several ranks it is each rank's own, as without LargeBatch.
        """
        seeds, index = self._seeds, self._index
        base = mixed_seed(seeds.own, index) if index else seeds.own
        if self._ranks == 1:
            given = _entry(seeds.shuffle, index)
            if given is None and index == 0:
                given = int(os.environ.get("PL_GLOBAL_SEED", base))
            base = base if given is None else given
            _enter(seeds.shuffle, index, base)
        epoch, number = self.current.epoch, self.current.number
        return mixed_seed(base, epoch, number) if number else base + epoch

    def seed_generator(self, generator: Any) -> None:
        """Gives a user's own generator the same numbers in every run of a pass, if it is one of torch's.

        They depend on the seed that the user gave it, and on nothing that ranks may not share: some samplers draw the
        same order everywhere, to take each rank's part of it.
        """
        if not isinstance(generator, torch.Generator):
            return
        given = _entry(self._seeds.generators, self._index)
        if given is None:
            given = generator.initial_seed()
            _enter(self._seeds.generators, self._index, given)
        epoch, number = self.current.epoch, self.current.number
        old = self._seeds.own if self._seeds.is_single else 0
        seed = mixed_seed(given, self._index, epoch, number) if self._index or number else given + epoch + old
        generator.manual_seed(seed % 2**63)

    def follow(self, sampler: Any) -> None:
        """Keeps the seed of a DistributedSampler, or gives it the one of the checkpoint."""
        if not isinstance(sampler, DistributedSampler) or not sampler.shuffle:
            return
        restored = _entry(self._seeds.shuffle, self._index) if self._seeds.is_restored else None
        if restored is not None:
            sampler.seed = restored
        else:
            _enter(self._seeds.shuffle, self._index, sampler.seed)
