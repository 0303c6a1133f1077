"""Datasets, samplers and loaders of the kinds that people write themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, get_worker_info

from tests.lightning.composition.cell import MICRO_BATCH, SAMPLES
from tests.lightning.composition.observed import Samples, sample


def place_among_ranks() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Stream(IterableDataset):
    """Each rank and worker reads a share of its own, as the user's code must do it; ``noise`` as in `Samples`."""

    def __init__(self, noise: bool = False) -> None:
        self.noise = noise

    def __iter__(self) -> Iterator[Any]:
        rank, ranks = place_among_ranks()
        worker = get_worker_info()
        share, shares = rank, ranks
        if worker is not None:
            share, shares = rank * worker.num_workers + worker.id, ranks * worker.num_workers
        data = Samples(SAMPLES, noise=self.noise)
        yield from (data[index] for index in range(share, SAMPLES, shares))


class StreamOfKnownLength(Stream):
    """Tells how many samples a rank has."""

    def __len__(self) -> int:
        return SAMPLES // place_among_ranks()[1]


class Batched(IterableDataset):
    """Makes whole batches itself: ``DataLoader(batch_size=None)``."""

    def __iter__(self) -> Iterator[Any]:
        yield from DataLoader(Stream(), MICRO_BATCH)


class Halves(Sampler):
    """A sampler of the user's own: the second half first."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        half = len(self.data) // 2
        yield from [*range(half, len(self.data)), *range(half)]


class ByEpoch(Halves):
    """Has ``set_epoch`` and an order of its own in every epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(len(self.data), generator=generator).tolist()


class Share(Halves):
    """Divides the samples among the ranks itself: ``use_distributed_sampler=False``."""

    def __len__(self) -> int:
        return len(self.data) // place_among_ranks()[1]

    def __iter__(self) -> Iterator[int]:
        rank, ranks = place_among_ranks()
        yield from range(rank, len(self.data), ranks)


class NeighbourBatches(BatchSampler):
    """A batch sampler of the user's own: neighbours together, the batches shuffled."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        yield from (batches[index] for index in torch.randperm(len(batches)).tolist())


class ForeignBatches:
    """A batch sampler that is only a list of lists: no ``batch_size``, no base class."""

    def __init__(self, sizes: list[int] | None = None) -> None:
        self.sizes = sizes or [MICRO_BATCH] * (SAMPLES // MICRO_BATCH // place_among_ranks()[1])

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        rank, ranks = place_among_ranks()
        first = rank
        for size in self.sizes:
            yield [first + ranks * step for step in range(size)]
            first += ranks * size


class ManyPasses(DataLoader):
    """The pattern of timm's MultiEpochsDataLoader: one iterator, and workers, for all epochs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._DataLoader__initialized = False
        self.passes = len(self.batch_sampler)
        self.batch_sampler = _Again(self.batch_sampler)
        self._DataLoader__initialized = True
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return self.passes

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.passes):
            yield next(self.iterator)


class _Again:
    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batch_sampler


class OwnIteration(DataLoader):
    """A DataLoader that does something to every batch."""

    def __iter__(self) -> Iterator[Any]:
        for inputs, targets, who in super().__iter__():
            yield inputs * 2.0, targets, who


class Stateful(DataLoader):
    """Keeps its own position, as torchdata's StatefulDataLoader does."""

    position = 0
    restored = 0

    def __iter__(self) -> Iterator[Any]:
        first, self.restored = self.restored, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.position = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.restored = state["position"] % len(self)


class NoLoader:
    """Any iterable will do for Lightning; this one has a length."""

    def __init__(self, tells: bool) -> None:
        self.tells = tells

    def __len__(self) -> int:
        return SAMPLES // MICRO_BATCH // place_among_ranks()[1]

    @property
    def batch_size(self) -> int:
        if not self.tells:
            raise AttributeError("batch_size")
        return MICRO_BATCH

    def __iter__(self) -> Iterator[Any]:
        yield from DataLoader(Stream(), MICRO_BATCH)


@dataclasses.dataclass
class Triple:
    """A batch as a dataclass."""

    inputs: Tensor
    targets: Tensor
    who: Tensor


def as_dataclass(samples: list[Any]) -> Triple:
    inputs, targets, who = zip(*samples, strict=True)
    return Triple(torch.stack(inputs), torch.stack(targets), torch.tensor(who))


def as_mapping(samples: list[Any]) -> dict[str, Any]:
    """The strings come first, as they do in many a Hugging Face batch."""
    inputs, targets, who = zip(*samples, strict=True)
    texts = [str(one) for one in who]
    return {"texts": texts, "inputs": torch.stack(inputs), "targets": torch.stack(targets), "who": torch.tensor(who)}


def as_images(samples: list[Any]) -> tuple[Any, Tensor, Tensor]:
    """Inputs stay a list: of images of different sizes, say."""
    inputs, targets, who = zip(*samples, strict=True)
    return list(inputs), torch.stack(targets), torch.tensor(who)


assert len(sample(0)) == 3
