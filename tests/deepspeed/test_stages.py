"""LargeBatch's stages under ZeRO: the planned steps, and bitwise resume, also from inside a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from zero_setting import on_ranks


def train_on_a_rank(folder: str, saved: list[int]) -> dict[int, Any]:
    from lightning_lamb.deepspeed import LambDeepSpeedStrategy
    from tests.lightning.staged_toys import STAGES, Staged, everything, train_staged
    from tests.lightning.test_stages_sharded import SaveAt

    class Single(Staged):
        def __init__(self) -> None:
            super().__init__()
            self.float()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch.float(), batch_idx)

    found = {}
    for resume in (0, *saved):
        module = Single()
        buckets = {"stage": 2, "reduce_bucket_size": 10000, "allgather_bucket_size": 10000}
        config = {"zero_allow_untested_optimizer": True, "zero_optimization": buckets}
        train_staged(
            module,
            resume=f"{folder}/{resume}.ckpt" if resume else None,
            callbacks=[] if resume else [SaveAt(folder, saved)],
            stages=[{**stage, "micro_batch_size": 1} for stage in STAGES],
            devices=2,
            strategy=LambDeepSpeedStrategy(config=config),
            limit_val_batches=0,
        )
        found[resume] = (everything(module), module.steps)
    return found


@pytest.mark.slow
def test_zero_2_trains_and_resumes_the_stages(tmp_path: Path) -> None:
    for found in on_ranks(train_on_a_rank, 2, str(tmp_path), [6, 14, 17]):
        final, steps = found[0]
        assert [step["samples"] for step in steps] == [4, 4, 2, 4, 2, 2, 2]
        assert [step["lr"] for step in steps] == pytest.approx([0.01, 0.02, 0.01, 0.005, 0.005, 0.01, 0.01 / 3])
        for resumed, later in list(found.values())[1:]:
            assert later == steps[len(steps) - len(later) :]
            assert [name for name in final if not torch.equal(resumed[name], final[name])] == []
