"""Optimizers that were built before the strategy replaced the parameters train the live ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_lamb import Lamb, LargeBatch
from lightning_lamb.callbacks.live_parameters import LiveParameters
from lightning_lamb.errors import ConflictError
from tests.distributed import run_ranks
from tests.lightning.toys import Batches, Regression, largest_difference, quiet_trainer, regression_data, weights


class BuiltEarly(Regression):
    """What the stock LightningCLI does: the optimizer exists first, then configure_model replaces parameters."""

    def __init__(self, replace: str) -> None:
        super().__init__()
        self.replace = replace
        self.optimizer = Lamb(self.parameters(), lr=0.02)  # bare parameters, no names

    def configure_model(self) -> None:
        if self.replace == "copy":
            self.net = copy.deepcopy(self.net)
        elif self.replace == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        elif self.replace == "other layers":
            self.net = nn.Sequential(nn.Linear(6, 2)).double()

    def configure_optimizers(self) -> Any:
        return self.optimizer


def train(replace: str, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    module = BuiltEarly(replace)
    trainer = quiet_trainer(**({"max_epochs": 1, "callbacks": list(callbacks)} | options))
    trainer.fit(module, datamodule=Batches(regression_data(16), 4))
    return module, trainer


def test_large_batch_points_the_optimizer_at_replaced_parameters() -> None:
    module, trainer = train("copy", LargeBatch(4))
    expected, _ = train("nothing", LargeBatch(4))
    assert largest_difference(weights(module), weights(expected)) == 0.0
    assert largest_difference(weights(module), weights(Regression())) > 0.0
    assert list(trainer.optimizers[0].trust_ratios) == ["net.0.weight", "net.3.weight"]  # and gives it names


def fsdp2_on_a_rank() -> dict[str, Any]:
    module, trainer = train(
        "fsdp2",
        LargeBatch(8),
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        use_distributed_sampler=False,
    )
    ratios = {name: float(ratio) for name, ratio in trainer.optimizers[0].trust_ratios.items()}
    live = {id(parameter) for parameter in module.parameters()}
    held = [id(p) in live for group in trainer.optimizers[0].param_groups for p in group["params"]]
    return {"ratios": ratios, "held": held}


def test_under_fsdp2_the_stock_way_trains_the_live_parameters() -> None:
    """Without LargeBatch the optimizer held 0 of 6 live parameters, and training changed nothing (Lightning #19110)."""
    whole = BuiltEarly("nothing")
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8)])
    trainer.fit(whole, datamodule=Batches(regression_data(16), 8))
    expected = {name: float(ratio) for name, ratio in trainer.optimizers[0].trust_ratios.items()}
    for result in run_ranks(fsdp2_on_a_rank, 2, init_group=False):
        assert result["held"] == [True] * 6
        assert result["ratios"] == pytest.approx(expected, rel=1e-9)


def test_a_parameter_without_a_successor_is_refused() -> None:
    with pytest.raises(ConflictError, match=r"it was 'net\.1\.weight'.*LambMixin, LambCLI"):
        train("other layers", LargeBatch(4))


def test_state_moves_with_the_parameter() -> None:
    module = nn.Linear(2, 2)
    optimizer = Lamb(module.parameters(), lr=0.1)
    before = LiveParameters(module)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    module.weight = nn.Parameter(module.weight.detach().clone())
    assert before.rebind([optimizer], module) == 1
    assert set(optimizer.state) == set(module.parameters())
    assert "param_names" not in optimizer.param_groups[0]
