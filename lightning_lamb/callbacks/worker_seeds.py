"""Random numbers of dataloader workers as a function of the micro-batch, so that a worker can begin in the middle.

A worker is seeded once, when it starts, and what it draws for a sample depends on all that it has loaded before. Here
it is seeded anew for every micro-batch, by this rank's seed, the pass and the micro-batch's number, however many there
are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import get_worker_info

from lightning_lamb.callbacks.random_states import mixed_seed, seed_all


class SeededIndices(list[Any]):
    """The indices of one micro-batch. A worker that begins to load them is seeded.

    Args:
        indices: of a batch sampler.
        seed: of this micro-batch.
    """

    def __init__(self, indices: list[Any], seed: int) -> None:
        super().__init__(indices)
        self.seed: int | None = seed

    def __iter__(self) -> Iterator[Any]:
        """The indices."""
        if self.seed is not None and get_worker_info() is not None:
            seed_all(self.seed)
            self.seed = None
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels to the worker without being iterated twice."""
        return SeededIndices, (self[:], self.seed)


def worker_seeding(loader: Any) -> tuple[int, ...] | None:
    """How the workers of a loader are to be seeded, beside this rank's seed.

    Returns:
        Numbers to mix in: the rank, where ``seed_everything(workers=True)`` asked for seeds that differ by rank. None:
        there are no workers, or the user seeds them in a ``worker_init_fn``.
    """
    if not getattr(loader, "num_workers", 0):
        return None
    given = getattr(loader, "worker_init_fn", None)
    if given is None:
        return ()
    if isinstance(given, functools.partial) and given.func.__name__ == "pl_worker_init_function":
        return (int(given.keywords.get("rank") or 0),)
    return None


def seeded(indices: Any, seeds: tuple[int, ...] | None, number: int) -> Any:
    """Indices that seed the worker which loads them.

    Args:
        indices: what a batch sampler gave; only a list is changed.
        seeds: of the pass; None: the indices as they are.
        number: of the micro-batch in the pass.
    """
    return (
        SeededIndices(indices, mixed_seed(*seeds, number)) if seeds is not None and type(indices) is list else indices
    )
