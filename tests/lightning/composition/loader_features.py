"""Loaders: what they load from, who samples, where they come from, and what Lightning combines them to."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tests.lightning.composition import datasets
from tests.lightning.composition.cell import MICRO_BATCH, SAMPLES, LoaderFeature, even
from tests.lightning.composition.observed import Samples

M = MICRO_BATCH


def loader(data: Any = None, **options: Any) -> DataLoader:
    """Batches of two."""
    return DataLoader(data if data is not None else Samples(), **({"batch_size": M} | options))


def short(**options: Any) -> DataLoader:
    """Eight other samples."""
    return loader(Samples(8, first=100), **options)


def combined(mode: str) -> Any:
    return lambda: CombinedLoader({"first": loader(shuffle=True), "second": short(shuffle=True)}, mode)


def own_distributed() -> DataLoader:
    """The user's own DistributedSampler."""
    rank, ranks = datasets.place_among_ranks()
    return loader(sampler=DistributedSampler(Samples(), num_replicas=ranks, rank=rank, seed=5))


def batches_of(sampler: Any) -> DataLoader:
    return DataLoader(Samples(), batch_sampler=sampler)


ASKED = {"micro_batch_size": M}
ONE_PROCESS = (1,)
"""Workers are forked, and torch's gloo groups do not survive it in these tests, with Lightning alone either."""
NO_SAMPLER = {"use_distributed_sampler": False}
PLAIN = [
    LoaderFeature("map dataset, in order", loader),
    LoaderFeature("map dataset, shuffled", lambda: loader(shuffle=True), shuffles=True),
    LoaderFeature(
        "last micro-batch short",
        lambda: loader(Samples(SAMPLES - datasets.place_among_ranks()[1])),
        sizes=lambda ranks: even((SAMPLES - ranks) // ranks),
        complete=False,
        remark="every sample of the short window has the same weight",
    ),
    LoaderFeature(
        "`drop_last=True`",
        lambda: loader(Samples(34), drop_last=True),
        sizes=lambda ranks: [M] * (34 // ranks // M),
        complete=False,
    ),
    LoaderFeature("workers", lambda: loader(shuffle=True, num_workers=1), shuffles=True, ranks=ONE_PROCESS),
    LoaderFeature(
        "workers kept between epochs",
        lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
        shuffles=True,
        ranks=ONE_PROCESS,
    ),
    LoaderFeature(
        "map dataset, augmentation in workers",
        lambda: loader(Samples(noise=True), shuffle=True, num_workers=2),
        augments=True,
        shuffles=True,
        ranks=ONE_PROCESS,
    ),
    LoaderFeature("IterableDataset with a length", lambda: loader(datasets.StreamOfKnownLength())),
    LoaderFeature("IterableDataset without a length", lambda: loader(datasets.Stream()), length_known=False),
    LoaderFeature(
        "IterableDataset, augmentation in workers",
        lambda: loader(datasets.Stream(noise=True), num_workers=1),
        length_known=False,
        augments=True,
        ranks=ONE_PROCESS,
    ),
    LoaderFeature(
        "`batch_size=None`, batches from the dataset",
        lambda: DataLoader(datasets.Batched(), batch_size=None),
        large_batch=ASKED,
        length_known=False,
        remark="give `micro_batch_size`",
    ),
    LoaderFeature(
        "`batch_size=None`, size not given",
        lambda: DataLoader(datasets.Batched(), batch_size=None),
        refused=r"micro-batch.*without a batch_size",
    ),
]

SAMPLERS = [
    LoaderFeature("SequentialSampler", lambda: loader(sampler=SequentialSampler(Samples()))),
    LoaderFeature(
        "RandomSampler with a generator",
        lambda: loader(sampler=RandomSampler(Samples(), generator=torch.Generator().manual_seed(1))),
        shuffles=True,
    ),
    LoaderFeature(
        "SubsetRandomSampler",
        lambda: loader(sampler=SubsetRandomSampler(range(0, SAMPLES, 2))),
        sizes=lambda ranks: even(SAMPLES // 2 // ranks),
        complete=False,
        shuffles=True,
    ),
    LoaderFeature(
        "WeightedRandomSampler, with replacement",
        lambda: loader(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
        once=False,
        shuffles=True,
    ),
    LoaderFeature("a sampler of one's own", lambda: loader(sampler=datasets.Halves(Samples()))),
    LoaderFeature("a sampler with `set_epoch`", lambda: loader(sampler=datasets.ByEpoch(Samples())), shuffles=True),
    LoaderFeature(
        "a sampler that divides among ranks", lambda: loader(sampler=datasets.Share(Samples())), trainer=NO_SAMPLER
    ),
    LoaderFeature("DistributedSampler of one's own", own_distributed, trainer=NO_SAMPLER, shuffles=True),
    LoaderFeature(
        "BatchSampler",
        lambda: batches_of(BatchSampler(own_distributed().sampler, M, drop_last=False)),
        trainer=NO_SAMPLER,
        shuffles=True,
        remark="on several ranks with `use_distributed_sampler=False`: Lightning itself loses its batches otherwise",
    ),
    LoaderFeature(
        "a batch sampler of one's own",
        lambda: batches_of(datasets.NeighbourBatches(SequentialSampler(Samples()), M, drop_last=False)),
        shuffles=True,
    ),
    LoaderFeature(
        "a batch sampler without `batch_size`",
        lambda: batches_of(datasets.ForeignBatches()),
        trainer=NO_SAMPLER,
        large_batch=ASKED,
        remark="give `micro_batch_size`",
    ),
    LoaderFeature(
        "a batch sampler without `batch_size`, size not given",
        lambda: batches_of(datasets.ForeignBatches()),
        trainer=NO_SAMPLER,
        refused=r"micro-batch.*without a batch_size",
    ),
    LoaderFeature(
        "batches larger than `micro_batch_size`",
        lambda: batches_of(datasets.ForeignBatches([2, 3, 2, 3, 2, 3])),
        trainer=NO_SAMPLER,
        large_batch=ASKED,
        refused=r"micro.batch",
    ),
]

ITERATIONS = [
    LoaderFeature("one iterator for all epochs", lambda: datasets.ManyPasses(Samples(), M), ranks=(1,)),
    LoaderFeature("a DataLoader with its own `__iter__`", lambda: datasets.OwnIteration(Samples(), M)),
    LoaderFeature("stateful loader", lambda: datasets.Stateful(Samples(), M)),
    LoaderFeature("no DataLoader, tells its size", lambda: datasets.NoLoader(tells=True)),
    LoaderFeature("no DataLoader, size given", lambda: datasets.NoLoader(tells=False), large_batch=ASKED),
    LoaderFeature(
        "CombinedLoader min_size",
        combined("min_size"),
        sizes=lambda ranks: [M] * (4 // ranks),
        trainer={"max_epochs": 3},
        complete=False,
        large_batch={"global_batch_size": 4, "base_batch_size": 1},
    ),
    LoaderFeature("CombinedLoader max_size_cycle", combined("max_size_cycle"), shuffles=True),
    LoaderFeature("CombinedLoader max_size", combined("max_size"), shuffles=True),
    LoaderFeature("CombinedLoader sequential", combined("sequential"), refused="sequential"),
    LoaderFeature("a dict of loaders", lambda: {"first": loader(shuffle=True), "second": short()}, shuffles=True),
    LoaderFeature("a list of loaders", lambda: [loader(shuffle=True), short()], shuffles=True),
    LoaderFeature(
        "loaders of different sizes, not given",
        lambda: {"first": loader(), "second": short(batch_size=4)},
        refused=r"several dataloaders of different sizes",
    ),
    LoaderFeature(
        "loaders of different sizes, size given",
        lambda: {"first": loader(), "second": short(batch_size=4)},
        large_batch=ASKED,
        remark="the first loader's samples count",
    ),
]

BATCHES = [
    LoaderFeature("batches as mappings", lambda: loader(collate_fn=datasets.as_mapping)),
    LoaderFeature("batches as dataclasses", lambda: loader(collate_fn=datasets.as_dataclass)),
    LoaderFeature("images in lists", lambda: loader(collate_fn=datasets.as_images)),
]


def from_elsewhere(feature: LoaderFeature, name: str, **changes: Any) -> LoaderFeature:
    """The same loader, made by the data module or the module."""
    return dataclasses.replace(feature, name=name, **changes)


SHUFFLED = PLAIN[1]
PLACES = [
    from_elsewhere(SHUFFLED, "from the data module, which has `batch_size`", place="datamodule", declares=M),
    from_elsewhere(SHUFFLED, "from the data module, size only in the loader", place="datamodule"),
    from_elsewhere(SHUFFLED, "from the module", place="module"),
    from_elsewhere(
        SHUFFLED, "from the module, which divides `batch_size` in `setup`", place="module", declares=2 * M, divides=True
    ),
    from_elsewhere(
        SHUFFLED,
        "data module's `batch_size` is another, size given",
        place="datamodule",
        declares=16,
        large_batch=ASKED,
    ),
    from_elsewhere(
        SHUFFLED, "data module's `batch_size` is another", place="datamodule", declares=16, refused=r"batch_size"
    ),
    from_elsewhere(
        SHUFFLED, "reloaded every epoch", place="datamodule", trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    from_elsewhere(
        SHUFFLED,
        "reloaded with another batch size",
        place="growing",
        trainer={"reload_dataloaders_every_n_epochs": 1},
        refused=r"batch",
    ),
]

LOADERS = [*PLAIN, *SAMPLERS, *ITERATIONS, *BATCHES, *PLACES]
