"""A run that was stopped after any micro-batch, or in the middle of one, continues bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.lightning.staged_toys import Dropping, SaveEverywhere, Staged, StagedData, everything, train_staged


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
