"""ThroughputMonitor counts what a step really took in, and does not count what is no training."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_lamb import LargeBatch
from lightning_lamb.callbacks import ThroughputMonitor
from lightning_lamb.errors import InvalidOptionError
from tests.lightning.toys import Batches, Endless, Regression, quiet_trainer, regression_data


class Texts(Dataset):
    """Dicts, as tokenized text comes: 12 token ids and the numbers that Regression learns from."""

    def __init__(self, samples: int) -> None:
        self.numbers = regression_data(samples)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        inputs, targets = self.numbers[index]
        return {"input_ids": torch.arange(12), "inputs": inputs, "targets": targets}


class Reader(Regression):
    """Regression on dicts; takes 2 ms per micro-batch, and 50 ms to validate."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        time.sleep(0.002)
        return super().training_step([batch["inputs"], batch["targets"]], batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        if name == "samples_per_step":
            self.logged.append({})
        if self.logged:
            self.logged[-1][name] = float(value)


class Validated(Batches):
    def val_dataloader(self) -> DataLoader:
        return DataLoader(Texts(4), 4)


def fitted(monitor: ThroughputMonitor, **options: Any) -> list[dict[str, float]]:
    module = Reader()
    trainer = quiet_trainer(callbacks=[LargeBatch(global_batch_size=12), monitor], num_sanity_val_steps=0, **options)
    trainer.fit(module, Validated(Texts(32), 4))
    return module.logged


def test_samples_and_tokens_are_counted_per_optimizer_step_also_in_short_windows():
    monitor = ThroughputMonitor(tokens="input_ids")
    steps = fitted(monitor, max_epochs=2)
    assert [step["samples_per_step"] for step in steps] == [12, 12, 8] * 2
    assert [(samples, tokens) for _, samples, tokens in monitor.steps] == [(12, 144), (12, 144), (8, 96)] * 2
    for step in steps:
        assert step["tokens_per_second"] == pytest.approx(12 * step["samples_per_second"])
        assert 0 < step["samples_per_second"] <= 4 / 0.002


def test_the_remaining_time_reaches_zero_and_leaves_validation_out():
    monitor = ThroughputMonitor()
    steps = fitted(monitor, max_epochs=4, val_check_interval=1)
    assert len(steps) == 12
    assert steps[-1]["eta_minutes"] == 0
    assert steps[0]["eta_minutes"] > 0
    # 32 micro-batches were validated after, 50 ms each: 12 steps would take 1.6 s more with that.
    total = sum(seconds for seconds, _, _ in monitor.steps)
    assert 32 * 0.002 < total < 1.6
    assert "tokens_per_second" not in steps[0]


def test_the_remaining_time_knows_that_later_stages_have_other_steps():
    """Stage 2 has steps of 4 samples of 6 tokens, stage 1 of 12 of 3: two thirds of the work."""
    stages = [
        {"steps": 3, "global_batch_size": 12, "data": {"sequence_length": 3}},
        {"steps": 4, "global_batch_size": 4, "data": {"sequence_length": 6}},
    ]
    monitor, module = ThroughputMonitor(window=50), Reader()
    data = Validated(Texts(36), 4)
    data.sequence_length = 0
    quiet_trainer(callbacks=[LargeBatch(stages=stages), monitor]).fit(module, data)
    assert [step["samples_per_step"] for step in module.logged] == [12, 12, 12, 4, 4, 4, 4]
    assert len(monitor.steps) == 4  # of the last stage only
    seconds_per_step = module.logged[0]["samples_per_step"] / module.logged[0]["samples_per_second"]
    assert module.logged[0]["eta_minutes"] * 60 == pytest.approx((2 + 4 * 24 / 36) * seconds_per_step)
    assert module.logged[-1]["eta_minutes"] == 0


def test_a_training_without_an_end_has_no_remaining_time():
    steps = fitted(ThroughputMonitor(), max_epochs=-1, max_time={"seconds": 1})
    assert steps
    assert not any("eta_minutes" in step for step in steps)


class Logging(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.logged: set[str] = set()

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        assert math.isfinite(value)
        self.logged.add(name)


@pytest.mark.parametrize("large_batch", [False, True], ids=["alone", "beside LargeBatch"])
def test_a_dataset_without_a_length_has_no_remaining_time(large_batch: bool):
    """The training stopped, because its length was asked for."""
    module, callbacks = Logging(), [LargeBatch(8)] if large_batch else []
    trainer = quiet_trainer(callbacks=[*callbacks, ThroughputMonitor()], max_epochs=2)
    trainer.fit(module, DataLoader(Endless(), 4))
    assert {"samples_per_step", "samples_per_second"} <= module.logged
    assert "eta_minutes" not in module.logged
    assert trainer.global_step == (16 if large_batch else 32)


def test_samples_that_a_batch_does_not_tell_are_left_out():
    class Strange(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step([batch["x"], batch["y"][:4]], batch_idx)

    def collated(items: list[Any]) -> dict[str, torch.Tensor]:
        return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items * 2])}

    module = Strange()
    trainer = quiet_trainer(callbacks=[ThroughputMonitor()], max_epochs=1)
    with pytest.warns(UserWarning, match=r"goes on without samples.*batch\['x'\].shape\[0\] = 4"):
        trainer.fit(module, DataLoader(Endless(), 4, collate_fn=collated))
    assert trainer.global_step == 16
    assert "samples_per_step" not in module.logged


def test_a_key_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(InvalidOptionError, match=r"tokens='ids'.*it has input_ids, inputs, targets"):
        fitted(ThroughputMonitor(tokens="ids"), max_epochs=1)
    with pytest.raises(InvalidOptionError, match=r"it has no keys \(a list\)"):
        quiet_trainer(callbacks=[ThroughputMonitor(tokens="input_ids")], max_epochs=1).fit(
            Regression(), DataLoader(regression_data(8), 4)
        )
    with pytest.raises(InvalidOptionError, match="window"):
        ThroughputMonitor(window=0)
