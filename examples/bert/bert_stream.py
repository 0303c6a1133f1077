"""An endless, resumable stream of micro-batches: a function of the samples drawn so far over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from bert_samples import Key, MaskedPairs


class SampleStream:
    """Yields micro-batches for one rank; pass after pass over the data, each in an order of its own.

    The stream counts samples over all ranks, so that a run resumed on another number of ranks continues where it was.
    Lightning saves and restores it by ``state_dict`` and ``load_state_dict``.

    Args:
        samples: the data.
        batch_size: samples per micro-batch and rank.
        batches: micro-batches per iteration, which is one epoch of the Trainer. The stream goes on in the next.
        rank: of this process among those that see different samples.
        ranks: how many these are.
        seed: of the order.
        num_workers: processes that prepare samples.
    """

    def __init__(
        self,
        samples: MaskedPairs,
        batch_size: int,
        batches: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.batches = batches
        self.rank = rank
        self.ranks = ranks
        self.seed = seed
        self.num_workers = num_workers
        self.drawn = 0
        """Samples drawn by all ranks together."""
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        loader: Any = DataLoader(self.samples, batch_sampler=_Keys(self, self.drawn), num_workers=self.num_workers)
        for batch in loader:
            self.drawn += self.batch_size * self.ranks  # before the yield: a checkpoint counts what training got
            yield batch

    def key(self, position: int) -> Key:
        """The sample at a position of the stream."""
        pass_index, place = divmod(position, len(self.samples))
        if pass_index not in self._orders:
            random = np.random.default_rng((self.seed, pass_index))
            self._orders = {pass_index: random.permutation(len(self.samples)), **dict([*self._orders.items()][:1])}
        return pass_index, int(self._orders[pass_index][place])

    def state_dict(self) -> dict[str, int]:
        """Plain numbers."""
        return {"drawn": self.drawn, "sequence_length": self.samples.pairs.tokens.shape[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues a stream of the same sequence length; one of another length belongs to another stage."""
        same = state["sequence_length"] == self.samples.pairs.tokens.shape[1]
        self.drawn = state["drawn"] if same else 0


class _Keys:
    """The keys of this rank's micro-batches from a position on."""

    def __init__(self, stream: SampleStream, start: int) -> None:
        self.stream = stream
        self.start = start

    def __len__(self) -> int:
        return self.stream.batches

    def __iter__(self) -> Iterator[list[Key]]:
        stream = self.stream
        for batch in range(stream.batches):
            first = self.start + (batch * stream.ranks + stream.rank) * stream.batch_size
            yield [stream.key(position) for position in range(first, first + stream.batch_size)]
