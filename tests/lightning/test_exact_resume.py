"""A run that was stopped after any micro-batch, or in the middle of one, continues bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from tests.distributed import rank, run_ranks
from tests.lightning.staged_toys import (
    STAGES,
    Dropping,
    Noisy,
    SaveEverywhere,
    Staged,
    StagedData,
    everything,
    train_staged,
)


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("validates", [False, True], ids=["no validation", "validates"])
def test_one_process_resumes_bitwise_at_every_micro_batch(tmp_path: Path, validates: bool) -> None:
    options: dict[str, Any] = {"val_check_interval": 3} if validates else {"limit_val_batches": 0}
    whole = Dropping()
    train_staged(whole, StagedData(augment=True), callbacks=[SaveEverywhere(tmp_path)], **options)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 2 * len(whole.losses)
    for checkpoint in checkpoints:
        torch.manual_seed(99)  # another process would not have the first one's random numbers
        resumed = Dropping()
        train_staged(resumed, StagedData(augment=True), resume=checkpoint, **options)
        assert resumed.steps == whole.steps[len(whole.steps) - len(resumed.steps) :], checkpoint.name
        tail = len(whole.losses) - len(resumed.losses)
        assert [float(loss) for loss in resumed.losses] == [float(loss) for loss in whole.losses[tail:]], (
            checkpoint.name
        )
        assert differing(everything(whole), everything(resumed)) == [], checkpoint.name


class StatefulLoader:
    """A user's own loader: unshuffled, it continues from its state, and LargeBatch leaves it alone."""

    def __init__(self, batch_size: int, length: int) -> None:
        self.batch_size, self.data, self.position = batch_size, Noisy(length, False), 0

    def __len__(self) -> int:
        return len(self.data) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        start, self.position = self.position, 0
        for first in range(start, len(self.data), self.batch_size):
            self.position = (first + self.batch_size) % len(self.data)
            yield torch.stack([self.data[first + index] for index in range(self.batch_size)])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Stream(IterableDataset):
    """Samples without a length or a state."""

    def __init__(self, length: int) -> None:
        self.data = Noisy(length, False)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.data[index] for index in range(len(self.data)))


class Batches:
    """A user's own loader without a state: it can only be iterated past what was seen."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.loader)


class OtherData(StagedData):
    kind = "stateful"

    def train_dataloader(self) -> Any:
        if self.kind == "stateful":
            return StatefulLoader(self.batch_size, self.length)
        if self.kind == "stream":
            return DataLoader(Stream(self.length), self.batch_size)
        data = Noisy(self.length, False)
        if self.kind == "own class":
            return Batches(DataLoader(data, self.batch_size))
        if self.kind == "weighted":  # draws from the global generator
            weighted = WeightedRandomSampler(torch.linspace(1, 2, len(data)), len(data))
            return DataLoader(data, self.batch_size, sampler=weighted)
        if self.kind == "own generator":
            return DataLoader(data, self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))
        return DataLoader(data, self.batch_size, shuffle=True, num_workers=1, persistent_workers=True)


@pytest.mark.parametrize("kind", ["stateful", "stream", "own class", "weighted", "own generator", "workers"])
def test_every_kind_of_loader_continues_exactly(tmp_path: Path, kind: str) -> None:
    def data() -> OtherData:
        made = OtherData()
        made.kind = kind
        return made

    sized = {"stages": [{**stage, "micro_batch_size": 2} for stage in STAGES]} if kind == "own class" else {}
    whole = Dropping()
    train_staged(whole, data(), callbacks=[SaveEverywhere(tmp_path)], limit_val_batches=0, **sized)
    for checkpoint in sorted(tmp_path.glob("*.ckpt"))[:: 12 if kind == "workers" else 3]:
        torch.manual_seed(99)
        resumed = Dropping()
        train_staged(resumed, data(), resume=checkpoint, limit_val_batches=0, **sized)
        assert differing(everything(whole), everything(resumed)) == [], checkpoint.name


# ---- ranks

LIMITS: dict[str, Any] = {"limit_val_batches": 0}
# On two ranks with micro-batches of 1 the first stage accumulates 4, as one rank with micro-batches of 2 does.
TWO_RANKS = [{**stage, "micro_batch_size": 1} for stage in STAGES]


def save_everywhere(folder: str, kind: type[Staged], ranks: int) -> dict[str, Any]:
    module = kind()
    torch.manual_seed(100 + rank() if ranks > 1 else 100)  # ranks may draw other random numbers
    options = LIMITS | ({"devices": ranks, "strategy": "ddp"} if ranks > 1 else {})
    saver = SaveEverywhere(Path(folder))
    train_staged(module, callbacks=[saver], stages=TWO_RANKS if ranks > 1 else STAGES, **options)
    return {"final": everything(module), "losses": [float(loss) for loss in module.losses], "lrs": rates(module)}


def resume_from_all(checkpoints: list[str], kind: type[Staged], ranks: int) -> dict[str, Any]:
    found = {}
    for checkpoint in checkpoints:
        module = kind()
        options = LIMITS | ({"devices": ranks, "strategy": "ddp"} if ranks > 1 else {})
        train_staged(module, resume=checkpoint, stages=TWO_RANKS if ranks > 1 else STAGES, **options)
        found[checkpoint] = {
            "final": everything(module),
            "losses": [float(loss) for loss in module.losses],
            "lrs": rates(module),
        }
    return found


def rates(module: Staged) -> list[float]:
    return [step["lr"] for step in module.steps]


def save_and_resume_on_a_rank(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole = save_everywhere(folder, Dropping, 2)
    torch.distributed.barrier()
    after, inside = sorted(Path(folder).glob("[0-9][0-9].ckpt")), sorted(Path(folder).glob("*-inside.ckpt"))
    return whole, resume_from_all([str(path) for path in (*after, *inside[::5])], Dropping, 2)


def test_two_ranks_resume_bitwise_at_every_micro_batch(tmp_path: Path) -> None:
    """With dropout, and other random numbers on every rank."""
    for index, (whole, resumed) in enumerate(run_ranks(save_and_resume_on_a_rank, 2, str(tmp_path), init_group=False)):
        assert len(resumed) >= len(whole["losses"])
        for checkpoint, found in resumed.items():
            tail = len(whole["losses"]) - len(found["losses"])
            assert found["losses"] == whole["losses"][tail:], checkpoint
            names = differing(whole["final"], found["final"])
            # DDP has one set of running statistics, rank 0's, and gives them to the others with the next batch.
            assert [name for name in names if index == 0 or "running" not in name] == [], checkpoint


def test_another_number_of_ranks_continues_the_same_training(tmp_path: Path) -> None:
    """One rank's checkpoints on two, at the same global batches; without dropout, whose masks are each rank's own."""
    whole = save_everywhere(str(tmp_path), Staged, 1)
    checkpoints = [str(path) for path in sorted(tmp_path.glob("*.ckpt"))]
    results = run_ranks(resume_from_all, 2, checkpoints[::6], Staged, 2, init_group=False)
    for found in (result for rank_results in results for result in rank_results.values()):
        assert found["lrs"] == whole["lrs"][len(whole["lrs"]) - len(found["lrs"]) :]
        for name, value in whole["final"].items():
            torch.testing.assert_close(found["final"][name], value, rtol=1e-6, atol=1e-6)


def save_on_a_rank(folder: str) -> dict[str, Any]:
    return save_everywhere(folder, Staged, 2)


def test_one_rank_continues_what_two_began(tmp_path: Path) -> None:
    whole = run_ranks(save_on_a_rank, 2, str(tmp_path), init_group=False)[0]
    checkpoints = [str(path) for path in sorted(tmp_path.glob("*.ckpt"))]
    for checkpoint, found in resume_from_all(checkpoints[::6], Staged, 1).items():
        for name, value in whole["final"].items():
            torch.testing.assert_close(found["final"][name], value, rtol=1e-6, atol=1e-6, msg=checkpoint)
