"""Stages under FSDP: the same training as on one process, resumed bit for bit, also from inside a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_lamb.strategies import CPUFSDPStrategy
from tests.distributed import run_ranks
from tests.lightning.staged_toys import STAGES, Staged, train_staged

LIMITS: dict[str, Any] = {"limit_val_batches": 0}


class Sharded(Staged):
    """FSDP2, where the strategy makes a mesh for it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not hasattr(self, "sharded"):
            self.sharded = True
            for layer in (self.net[0], self.net[4], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class SaveAt(Callback):
    """Saves after these micro-batches, counted from 1 over the whole training."""

    def __init__(self, folder: str, at: list[int]) -> None:
        self.folder, self.at, self.count = folder, at, 0

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        self.count += 1
        if self.count in self.at:
            trainer.save_checkpoint(f"{self.folder}/{self.count}.ckpt")


def full_weights(trainer: Trainer, module: nn.Module) -> dict[str, Tensor]:
    if isinstance(trainer.strategy.model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(trainer.strategy.model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
                for name, value in module.named_parameters()
            }
    named = ((name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in module.named_parameters())
    return {name: value.detach().clone() for name, value in named}


def strategy_named(name: str) -> Any:
    return ModelParallelStrategy(2, 1) if name == "fsdp2" else CPUFSDPStrategy(auto_wrap_policy={nn.Linear})


def train_on_a_rank(folder: str, strategy: str, saved: list[int]) -> dict[int, Any]:
    stages = [{**stage, "micro_batch_size": 1} for stage in STAGES]
    found = {}
    for resume in (0, *saved):
        module = Sharded()
        trainer = train_staged(
            module,
            resume=f"{folder}/{resume}.ckpt" if resume else None,
            callbacks=[] if resume else [SaveAt(folder, saved)],
            stages=stages,
            devices=2,
            strategy=strategy_named(strategy),
            **LIMITS,
        )
        weights = full_weights(trainer, module)
        found[resume] = (weights, module.steps)
    return found


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp1"])
def test_two_ranks_train_and_resume_the_stages(tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved inside a window, where stage 1 ends (after 4 + 4 + 2 + 4 micro-batches), and inside stage 2."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything: one rank has the order that two ranks share out
    whole = Staged()
    train_staged(whole, **LIMITS)
    for found in run_ranks(train_on_a_rank, 2, str(tmp_path), strategy, [6, 14, 17], init_group=False):
        final, steps = found[0]
        assert [step["lr"] for step in steps] == [step["lr"] for step in whole.steps]
        assert [2 * step["samples"] for step in steps] == [step["samples"] for step in whole.steps]
        for name, value in whole.named_parameters():
            # Under FSDP1, Lightning's 32-true makes the module float32; under FSDP2 it stays float64.
            torch.testing.assert_close(final[name].double(), value.detach(), rtol=2e-6, atol=2e-6)
        for resumed, later in list(found.values())[1:]:
            assert later == steps[len(steps) - len(later) :]
            assert [name for name in final if not torch.equal(resumed[name], final[name])] == []
