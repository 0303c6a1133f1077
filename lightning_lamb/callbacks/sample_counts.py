"""How many samples a micro-batch holds: told by the DataLoader, found in the batch, or asked for.

A DataLoader over a dataset with a length draws ``min(batch_size, len(sampler) - i * batch_size)`` samples for its i-th
batch. What a collate function made of them is looked for in the batch: the sizes there that equal the micro-batch when
it is full are candidates, all of them, until they disagree (a feature dimension may have the same size by chance).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from lightning_lamb.callbacks.batch_sizes import Place, places, shared_sizes
from lightning_lamb.callbacks.micro_batch import loader_batch_size
from lightning_lamb.errors import BatchSizeError, ConflictError, InvalidOptionError, LightningLambError
from lightning_lamb.lightning_data_seams import training_step_takes_iterator
from lightning_lamb.lightning_seams import Trainer, present_loaders

SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler, SubsetRandomSampler, WeightedRandomSampler)
"""Their length is how many samples they give; a user's own may be wrong about it."""


class SampleCounter:
    """Counts the samples of micro-batches.

    Args:
        micro_batch_size: samples in a full micro-batch, which none may exceed; None: not known.
    """

    def __init__(self, micro_batch_size: int | None) -> None:
        self.micro_batch_size = micro_batch_size
        self._candidates: tuple[Place, ...] = ()
        self._loaders: Any = None
        self._drawn: tuple[int, int] | None = None  # batch size and samples of an epoch, where the loader's are known
        self._dimensions = 2
        self._batches = True
        self._takes_iterator = False
        self._parts: dict[int, SampleCounter] | None = None

    def count(self, trainer: Trainer, batch: Any, batch_idx: int) -> int:
        """The samples of one micro-batch. No tensor is read, only its shape.

        Args:
            trainer: its dataloaders are looked at, when they are new.
            batch: what ``training_step`` gets.
            batch_idx: of the epoch.

        Raises:
            BatchSizeError: there are more than `micro_batch_size`.
            ConflictError: ``training_step`` takes the iterator, and a window has several micro-batches.
            InvalidOptionError: it cannot be told.
        """
        loaders = present_loaders(trainer)
        if loaders is not self._loaders:
            self._loaders = loaders
            self.look_at([] if loaders is None else list(loaders.flattened))
            self._parts = _parts_that_count(loaders, self.micro_batch_size)
            self._takes_iterator = training_step_takes_iterator(trainer)
        if self._takes_iterator:
            raise _iterator_error(trainer.accumulate_grad_batches)
        if self._parts is not None:
            batches = _batches_of_loaders(batch, loaders.iterables)
            if len(batches) == len(loaders.flattened):
                return sum(
                    0 if batches[index] is None else counter.count_batch(batches[index], batch_idx)
                    for index, counter in self._parts.items()
                )
        return self.count_batch(batch, batch_idx)

    def count_batch(self, batch: Any, batch_idx: int) -> int:
        """The samples of the batch of one loader, or of all that need not be told apart."""
        full = self.micro_batch_size
        drawn: int | None = None
        if self._drawn is not None:
            size, total = self._drawn
            drawn = min(size, total - batch_idx * size)
            if drawn <= 0 or (full is not None and drawn > full):
                drawn = None
        if full is None and drawn is None:
            return samples_in(batch)
        found = None
        for place in self._candidates:
            size_here = place.read(batch)
            if size_here is not None and size_here != found:
                if found is not None:
                    break
                found = size_here
        else:
            if found is not None and (found == drawn if drawn is not None else found <= (full or found)):
                return found
        return self._find(batch, drawn, full or drawn or 1)

    def look_at(self, loaders: list[Any]) -> None:
        """Notes what the dataloaders tell."""
        self._candidates, self._drawn = (), None
        self._dimensions = 1 if loaders and all(_collates_by_default(loader) for loader in loaders) else 2
        self._batches = not all(isinstance(one, DataLoader) and one.batch_sampler is None for one in loaders)
        if len(loaders) == 1 and isinstance(loaders[0], DataLoader):
            loader, batch_sampler = loaders[0], loaders[0].batch_sampler
            known = type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) in SAMPLERS
            if known and not isinstance(loader.dataset, IterableDataset):
                self._drawn = batch_sampler.batch_size, len(batch_sampler.sampler)  # type: ignore[union-attr,arg-type]

    def _find(self, batch: Any, drawn: int | None, full: int) -> int:
        """Finds out which sizes of the batch are its number of samples, or which of the candidates remain."""
        if full == 1 and not self._batches:
            return 1  # a sample as it is, without a dimension of samples
        expected = full if drawn is None else drawn
        known: dict[Place, int] = {}
        sizes: dict[Place, int] = {}
        for dimensions in sorted({self._dimensions, 2}):
            sizes = places(batch, dimensions)
            known = {place: sizes[place] for place in self._candidates if place in sizes}
            chosen = _having(expected, known or sizes)
            if chosen and (drawn is not None or len(set(known.values())) <= 1):
                self._candidates = chosen
                return expected
            size = self._shared(batch, dimensions, set(known.values()), sizes, drawn, full)
            if size is not None:
                self._candidates = _having(size, known) or _having(size, sizes)
                return size
        if drawn is not None:  # the collate function made something else of them (a graph, a packed row)
            return drawn
        raise InvalidOptionError(_unknown(batch, full, known or sizes))

    def _shared(
        self, batch: Any, dimensions: int, candidates: set[int], sizes: dict[Place, int], drawn: int | None, full: int
    ) -> int | None:
        """The one size that all parts of the batch share, where the candidates do not decide.

        Args:
            batch: the batch.
            dimensions: of tensors, how many are looked at.
            candidates: what stands where the number of samples was before.
            sizes: all sizes of the batch.
            drawn: how many samples the dataloader drew, if that is known.
            full: samples in a full micro-batch.
        """
        shared = shared_sizes(batch, dimensions if drawn is None else 1) or set()
        possible = {size for size in shared if size <= full}
        if drawn is not None:  # the collate function dropped some; or the loader began anew in the middle of an epoch
            dropped = len(candidates) == 1 and possible == candidates
            return possible.pop() if dropped and (max(possible) < drawn or self._dimensions == 1) else None
        if len(candidates) > 1:
            possible &= candidates
            if len(possible) != 1:
                possible = {size for size in candidates if size <= full}
        if len(possible) == 1:
            return possible.pop()
        if shared and min(shared) > full:
            raise BatchSizeError(_too_many(min(shared), full, _having(min(shared), sizes)))
        return None


def _parts_that_count(loaders: Any, micro_batch_size: int | None) -> dict[int, SampleCounter] | None:
    """Which of several dataloaders give the samples that a micro-batch counts, where they have different sizes.

    Returns:
        A counter for each, by its place among the loaders: the first whose batches are micro-batches, or all, if their
        batches together are one. None: they need not be told apart.
    """
    flattened = [] if loaders is None else list(loaders.flattened)
    sizes = [loader_batch_size(loader) for loader in flattened]
    known = [size for size in sizes if size is not None]
    if micro_batch_size is None or len(known) < max(2, len(sizes)) or set(known) == {micro_batch_size}:
        return None
    chosen = [index for index, size in enumerate(known) if size == micro_batch_size][:1]
    if not chosen and sum(known) == micro_batch_size:
        chosen = list(range(len(known)))
    parts = {index: SampleCounter(known[index]) for index in chosen}
    for index, counter in parts.items():
        counter.look_at([flattened[index]])
    return parts or None


def _batches_of_loaders(batch: Any, iterables: Any) -> list[Any]:
    """The batch of each dataloader, in the order of ``CombinedLoader.flattened``; shorter if the batch was rebuilt."""
    if isinstance(iterables, Mapping) and isinstance(batch, Mapping):
        pairs = [(batch[key], inner) for key, inner in iterables.items() if key in batch]
    elif isinstance(iterables, (list, tuple)) and isinstance(batch, (list, tuple)):
        pairs = list(zip(batch, iterables))
    else:
        return [] if isinstance(iterables, (Mapping, list, tuple)) else [batch]
    return [part for one, inner in pairs for part in _batches_of_loaders(one, inner)]


def samples_in(batch: Any) -> int:
    """The samples of a batch of which nothing is known but its structure: a size that all its parts share.

    Raises:
        InvalidOptionError: there is none.
    """
    for dimensions in (1, 2):
        shared = shared_sizes(batch, dimensions)
        if shared and len(shared) == 1:
            return shared.pop()
    raise InvalidOptionError(_unknown(batch, None, places(batch)))


def _iterator_error(accumulation: int) -> LightningLambError:
    """Why nothing can be counted where ``training_step`` fetches the batches itself."""
    if accumulation > 1:
        return ConflictError(
            "training_step(self, dataloader_iter) cannot accumulate: Lightning sets the gradients to zero one "
            f"micro-batch late there, so {accumulation} micro-batches per optimizer step would lose some. Take (self, "
            "batch, batch_idx), or make global_batch_size one micro-batch per rank."
        )
    return InvalidOptionError(
        "LargeBatch does not see the batches of training_step(self, dataloader_iter), so it cannot count their "
        "samples. Call lightning_lamb.callbacks.report_count(self, n) there, take (self, batch, batch_idx), or set "
        "exact_windows=False."
    )


def _having(size: int, sizes: dict[Place, int]) -> tuple[Place, ...]:
    """The places where ``size`` is."""
    return tuple(place for place, here in sizes.items() if here == size)


def _collates_by_default(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.batch_sampler is not None and loader.collate_fn is default_collate


def _too_many(size: int, full: int, where: Iterable[Place]) -> str:
    shown = ", ".join(map(str, list(where)[:3]))
    return (
        f"a micro-batch holds {size} samples ({shown} = {size}), more than micro_batch_size={full}, which the "
        "accumulation was derived from: the global batch would be larger than announced. Give LargeBatch the "
        "micro_batch_size that the data has, or call lightning_lamb.callbacks.report_count(self, n) in training_step."
    )


def _unknown(batch: Any, full: int | None, sizes: dict[Place, int]) -> str:
    shown = ", ".join(f"{place} = {size}" for place, size in list(sizes.items())[:8]) or "no size in it"
    micro = "" if full is None else f" (at most {full})"
    return (
        f"LargeBatch cannot tell how many samples{micro} a batch of type {type(batch).__name__} holds; candidates: "
        f"{shown}. Call lightning_lamb.callbacks.report_count(self, n) in training_step, or set exact_windows=False."
    )
