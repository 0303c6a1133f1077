"""Ranks that derived different numbers are named on every rank before the first step; none of them waits forever."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_lamb import LargeBatch
from lightning_lamb.errors import BatchSizeError, LightningLambError
from tests.distributed import rank, run_ranks
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


class MakesItsOwnData(Regression):
    def __init__(self, micro: int) -> None:
        super().__init__()
        self.micro = micro

    def train_dataloader(self) -> DataLoader:
        return DataLoader(regression_data(64), self.micro)


def outcome(large_batch: LargeBatch, module: Regression | None = None, micro: int = 4, samples: int = 64) -> str:
    """What this rank says, or how many steps it took."""
    module = module or Regression()
    limits = {"max_epochs": 1} if large_batch.stage_options is None else {}
    trainer = quiet_trainer(callbacks=[large_batch], devices=2, strategy="ddp", use_distributed_sampler=False, **limits)
    data: dict[str, Any] = {} if isinstance(module, MakesItsOwnData) else {"datamodule": Data(samples, micro)}
    try:
        trainer.fit(module, **data)
    except LightningLambError as error:
        assert module.micro_batches == []
        return f"{type(error).__name__}: {error}"
    return f"{trainer.global_step} steps"


class Data(Batches):
    def __init__(self, samples: int, micro: int) -> None:
        super().__init__(regression_data(samples), micro)
        self.kinds, self.change = set(), None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, self.batch_size)


# As text they are another thing in every process; a lambda cannot be sent to another one.
UNLIKE_TEXTS = {"kinds": {"train", "unlabelled", "synthetic"}, "change": lambda sample: sample}


def on_a_rank() -> dict[str, str]:
    here = rank()
    return {
        "equal": outcome(LargeBatch(16)),
        "micro-batch": outcome(LargeBatch(16), micro=4 + 4 * here),
        "made by the module": outcome(LargeBatch(16), MakesItsOwnData(4 + 4 * here)),
        "explicit": outcome(LargeBatch(16, micro_batch_size=4) if here else LargeBatch(16)),
        "one given": outcome(LargeBatch(16, micro_batch_size=8 - 4 * here)),
        "one wrong": outcome(LargeBatch(16), micro=4 - 4 * here),
        "global batch": outcome(LargeBatch(16 + 8 * here)),
        "rule": outcome(LargeBatch(16, base_batch_size=8, lr_scaling="linear" if here else "sqrt")),
        "windows": outcome(LargeBatch(16, exact_windows=bool(here))),
        "stages": outcome(LargeBatch(stages=[{"global_batch_size": 16, "steps": 2 + here}])),
        "objects": outcome(LargeBatch(stages=[{"global_batch_size": 16, "steps": 2, "data": UNLIKE_TEXTS}])),
        "epoch": outcome(LargeBatch(16), samples=64 - 4 * here),
    }


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return run_ranks(on_a_rank, 2, init_group=False, timeout=200)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("micro-batch", "disagree about micro_batch_size: [4] on rank 0; [8] on rank 1."),
        ("one given", "disagree about micro_batch_size: [8] on rank 0; [4] on rank 1."),
        ("made by the module", "disagree about micro_batch_size: [4] on rank 0; [8] on rank 1."),
        ("global batch", "disagree about global_batch_size: 16 on rank 0; 24 on rank 1."),
        ("rule", "disagree about lr_scaling: 'sqrt' on rank 0; 'linear' on rank 1."),
        ("windows", "disagree about exact_windows: False on rank 0; True on rank 1."),
        ("stages", "disagree about stages: "),
        ("epoch", "disagree about the micro-batches of an epoch: 16 on rank 0; 15 on rank 1."),
    ],
)
def test_what_differs_is_named_on_every_rank(outcomes: list[dict[str, str]], case: str, message: str) -> None:
    for said in outcomes:
        assert said[case].startswith("RankDisagreementError: the ranks " + message), said[case]


def test_ranks_that_agree_train(outcomes: list[dict[str, str]]) -> None:
    assert [said["equal"] for said in outcomes] == ["8 steps"] * 2
    assert [said["objects"] for said in outcomes] == ["2 steps"] * 2
    assert [said["explicit"] for said in outcomes] == ["8 steps"] * 2  # told in two ways, but the same


def test_what_one_rank_cannot_do_no_rank_does(outcomes: list[dict[str, str]]) -> None:
    first, second = (said["one wrong"] for said in outcomes)
    assert second.startswith("BatchSizeError: Data.batch_size=0 is no micro-batch")
    assert first.startswith("RankDisagreementError: rank 1 cannot train like this, so no rank does: Data.batch_size=0")


def test_one_process_compares_with_nobody() -> None:
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(16)])
    trainer.fit(Regression(), datamodule=Batches(regression_data(32), 4))
    assert trainer.global_step == 2
    with pytest.raises(BatchSizeError, match="global_batch_size=64 needs 16"):
        quiet_trainer(max_epochs=1, callbacks=[LargeBatch(64)]).fit(
            Regression(), datamodule=Batches(regression_data(32), 4)
        )
