"""A stateful loader that makes a DataLoader inside when its first batch is asked for, as BERT's stream does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.lightning.test_data_order import SAMPLES, Numbers, run


class StreamOfLoader:
    """Keeps its place."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return SAMPLES // 4

    def __iter__(self) -> Iterator[Tensor]:
        batches = [list(range(start, start + 4)) for start in range(self.place, SAMPLES, 4)]
        for batch in DataLoader(Numbers(), batch_sampler=batches):
            self.place = (self.place + 4) % SAMPLES
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_loader_made_again_in_a_resumed_run_moves_no_random_numbers_of_training(tmp_path: Path, at: int) -> None:
    """Its seed for workers was drawn from training's numbers, once more in the resumed run: dropout went apart."""
    torch.manual_seed(1)
    whole = run(StreamOfLoader, save=tmp_path / "a.ckpt", at=at)
    torch.manual_seed(2)
    assert run(StreamOfLoader, resume=tmp_path / "a.ckpt") == whole[at - at % 2 :]
