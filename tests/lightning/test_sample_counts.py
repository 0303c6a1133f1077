"""Samples are counted in batches of every structure, or asked for; a wrong count would weigh a micro-batch wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from lightning_lamb import LargeBatch
from lightning_lamb.callbacks.sample_counts import SampleCounter, samples_in
from lightning_lamb.errors import BatchSizeError, InvalidOptionError
from tests.lightning.toys import quiet_trainer

SAMPLES, MICRO = 10, 4  # micro-batches of 4, 4 and 2


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor


class Plain:
    """A batch as torch's documentation has it, of a class of its own."""

    def __init__(self, items: list[Any]) -> None:
        self.x, self.y = stacked(items)


class Graph:
    """As PyTorch Geometric's: so many nodes, of so many graphs."""

    def __init__(self, items: list[Any]) -> None:
        self.x = torch.cat([x.reshape(2, 3) for x, _ in items])
        self.y = torch.stack([y for _, y in items])
        self.num_graphs = len(items)


def stacked(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])


def nested(items: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.nested.nested_tensor([x[: 2 + i] for i, (x, _) in enumerate(items)]), stacked(items)[1]


# How items become a batch, and how a batch becomes (inputs of shape (B, 6), targets of shape (B,)) again.
STRUCTURES: dict[str, tuple[Callable[[list[Any]], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "lists of samples": (lambda items: tuple(zip(*items)), lambda b: (torch.stack(b[0]), torch.stack(b[1]))),
    "one list of pairs": (list, stacked),
    "one dict per sample": (
        lambda items: [{"x": x, "y": y} for x, y in items],
        lambda b: stacked([(item["x"], item["y"]) for item in b]),
    ),
    "time first": (
        lambda items: (stacked(items)[0].T.contiguous(), stacked(items)[1]),
        lambda b: (b[0].T, b[1]),
    ),
    "time first, as many steps as samples": (
        lambda items: (stacked(items)[0][:, :4].T.contiguous(), stacked(items)[1]),
        lambda b: (torch.cat([b[0].T, b[0].T[:, :2]], 1), b[1]),
    ),
    "a dict": (lambda items: dict(zip("xy", stacked(items))), lambda b: (b["x"], b["y"])),
    "names first, and a constant": (
        lambda items: ["train", torch.arange(4), {"deep": stacked(items)}],
        lambda b: b[2]["deep"],
    ),
    "a dataclass": (lambda items: Record(*stacked(items)), lambda b: (b.x, b.y)),
    "an object": (Plain, lambda b: (b.x, b.y)),
    "graphs": (Graph, lambda b: (b.x.reshape(-1, 6), b.y)),
    "a packed row, of nobody knows how many samples": (
        lambda items: (stacked(items)[0].reshape(1, -1), stacked(items)[1].reshape(1, -1)),
        lambda b: (b[0].reshape(-1, 6), b[1].reshape(-1)),
    ),
}


class Linear(LightningModule):
    """Keeps the gradient of its window."""

    def __init__(self, split: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 1).double()
        self.split = split
        self.gradients: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = self.split(batch)
        return (self.layer(x).squeeze(1) - y).pow(2).mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append(self.layer.weight.grad.clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def rows(samples: int = SAMPLES) -> TensorDataset:
    inputs = torch.randn(samples, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.sum(1).sin())


class Streamed(IterableDataset):
    """The same without a length."""

    def __iter__(self) -> Iterator[Any]:
        yield from rows()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_short_window_is_the_mean_over_its_samples_whatever_the_batch_looks_like(structure: str) -> None:
    """Images in lists counted their channels, time-major batches their time steps: 40 % off, without a word."""
    collate, split = STRUCTURES[structure]
    module = Linear(split)
    loader = DataLoader(rows(), MICRO, collate_fn=collate)
    quiet_trainer(max_epochs=2, callbacks=[LargeBatch(12)]).fit(module, loader)
    exact = torch.autograd.grad(module.training_step(collate(list(rows())), 0), module.layer.weight)[0]
    assert len(module.gradients) == 2
    for found in module.gradients:
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


UNTOLD = ("a packed row, of nobody knows how many samples", "names first, and a constant")
"""Without the loader's arithmetic a tensor of 4 numbers may be the 4 samples, and a row holds nobody knows how many."""


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name not in UNTOLD])
def test_so_it_is_without_a_length_as_far_as_the_batch_tells(structure: str) -> None:
    collate, split = STRUCTURES[structure]
    module = Linear(split)
    loader = DataLoader(Streamed(), MICRO, collate_fn=collate)
    quiet_trainer(max_epochs=1, callbacks=[LargeBatch(12)]).fit(module, loader)
    exact = torch.autograd.grad(module.training_step(collate(list(rows())), 0), module.layer.weight)[0]
    torch.testing.assert_close(module.gradients[0], exact, rtol=1e-12, atol=1e-12)


def test_sizes_that_disagree_are_asked_about() -> None:
    collate, split = STRUCTURES["names first, and a constant"]
    loader = DataLoader(Streamed(), MICRO, collate_fn=collate)
    with pytest.raises(
        InvalidOptionError, match=r"batch\[1\].shape\[0\] = 4, batch\[2\]\['deep'\]\[0\].shape\[0\] = 2"
    ):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(12)]).fit(Linear(split), loader)


def test_a_packed_row_without_a_length_is_asked_about() -> None:
    """Its sizes are 1 and whatever was packed; neither is the number of samples."""
    collate = lambda items: {"ids": torch.zeros(3, 5), "x": torch.zeros(2, 9)}
    loader = DataLoader(Streamed(), MICRO, collate_fn=collate)
    message = r"batch of type dict holds; candidates: batch\['ids'\].shape\[0\] = 3, .*report_count"
    with pytest.raises(InvalidOptionError, match=message):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(12)]).fit(Linear(lambda b: stacked(list(rows()))), loader)


def counts(batches: list[Any], micro: int = MICRO, loader: Any = None) -> list[int]:
    """What is counted in the micro-batches of one epoch."""
    loaders = None if loader is None else CombinedLoader(loader, "min_size")
    trainer: Any = SimpleNamespace(fit_loop=SimpleNamespace(_combined_loader=loaders, _data_fetcher=None))
    counter = SampleCounter(micro)
    return [counter.count(trainer, batch, index) for index, batch in enumerate(batches)]


def test_a_feature_dimension_that_equals_the_micro_batch_by_chance_drops_out() -> None:
    square, short = torch.zeros(4, 4), torch.zeros(2, 4)
    assert counts([[square, torch.zeros(4)], [short, torch.zeros(2)]]) == [4, 2]
    assert counts([square, short], loader=DataLoader(rows(6), 4)) == [4, 2]
    with pytest.raises(InvalidOptionError, match=r"batch.shape\[0\] = 2, batch.shape\[1\] = 4"):
        counts([square, short])  # or time first: nothing tells


def test_a_batch_with_more_than_the_micro_batch_is_refused() -> None:
    with pytest.raises(BatchSizeError, match=r"holds 8 samples \(batch\[0\].shape\[0\], batch.*= 8.*size=4"):
        counts([[torch.zeros(8, 6), torch.zeros(8)]])
    batches = [[torch.zeros(4, 6), torch.zeros(4)], [torch.zeros(5, 6), torch.zeros(5)]]
    with pytest.raises(BatchSizeError, match="holds 5 samples"):
        counts(batches)


def test_samples_that_the_collate_function_dropped_do_not_count() -> None:
    batches = [[torch.zeros(n, 6), torch.zeros(n)] for n in (4, 3, 4, 1)]
    assert counts(batches, loader=DataLoader(rows(16), 4, collate_fn=stacked)) == [4, 3, 4, 1]


def test_a_sampler_with_a_wrong_length_is_not_believed() -> None:
    class Boastful(SequentialSampler):
        def __len__(self) -> int:
            return 6

    loader = DataLoader(rows(8), 4, sampler=Boastful(rows(8)))
    assert counts([[torch.zeros(4, 6), torch.zeros(4)]] * 2, loader=loader) == [4, 4]


def test_several_loaders_count_where_the_micro_batch_is() -> None:
    batches = [{"a": torch.zeros(n, 6), "b": torch.zeros(16, 6)} for n in (4, 4, 2)]
    loaders = {"a": DataLoader(rows(), 4), "b": DataLoader(rows(48), 16)}
    assert counts(batches, loader=loaders) == [4, 4, 2]


def test_a_sample_by_itself_counts_one() -> None:
    class Single(Dataset):
        def __len__(self) -> int:
            return 3

    loader = DataLoader(Single(), batch_size=None)
    assert counts([(torch.zeros(6), torch.tensor(0.0))] * 3, micro=1, loader=loader) == [1, 1, 1]


def test_batches_of_unusual_kinds() -> None:
    assert counts([torch.nested.nested_tensor([torch.zeros(n) for n in range(1, k + 1)]) for k in (4, 2)]) == [4, 2]
    assert counts([pack_sequence([torch.zeros(5 - i) for i in range(k)]) for k in (4, 2)]) == [4, 2]
    assert counts([["a"] * 4, ["b"] * 2]) == [4, 2]
    assert counts([(torch.zeros(4, 2), None, "x"), (torch.zeros(1, 2), None, "x")]) == [4, 1]
    tensor_dict = SimpleNamespace(batch_size=torch.Size([4]), x=torch.zeros(4, 3))
    assert counts([tensor_dict]) == [4]
    with pytest.raises(InvalidOptionError, match=r"batch of type NoneType.*no size in it.*report_count"):
        counts([None])


def test_samples_are_counted_where_nothing_is_known_of_the_loader() -> None:
    assert samples_in({"ids": torch.zeros(3, 5), "mask": torch.zeros(3)}) == 3
    assert samples_in((["name"] * 4, torch.tensor(0.0), torch.zeros(4, 2))) == 4
    assert samples_in(([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)], [0, 1])) == 2
    with pytest.raises(InvalidOptionError, match=r"batch of type str.*report_count"):
        samples_in("text")
