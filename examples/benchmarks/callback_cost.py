"""What the callbacks cost where it matters most: a small model in Lightning, a micro-batch of about a millisecond.

    python examples/benchmarks/callback_cost.py --rounds 15 --markdown docs/callback_cost.md

Every round trains each contender once, in an order shuffled anew: twelve linear layers, Lamb, a CSV logger, logging
every 50 optimizer steps. The time of a window (an optimizer step and its micro-batches) is taken from one first
``training_step`` to the next, so everything that Lightning and callbacks do in between is in it. It is processor time
of this process, in which other programs on the machine hardly count. Ratios are over Lightning alone in the same round:
of the median of the windows between logging steps, and of the mean of all windows.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lamb import Lamb, LargeBatch, TrustRatioMonitor
from machine import describe

LAYERS, WIDTH, SAMPLES, LOG_EVERY, WARM_UP = 12, 128, 16, 50, 20
BARE = "Lightning alone"


class Idle(Callback):
    """Does nothing: what Lightning takes for calling any callback's hooks."""


CONTENDERS: dict[str, Callable[[int], list[Callback]]] = {
    BARE: lambda _: [],
    "an empty callback": lambda _: [Idle()],
    "LargeBatch": lambda accumulation: [LargeBatch(SAMPLES * accumulation)],
    "LargeBatch(exact_resume=False)": lambda accumulation: [LargeBatch(SAMPLES * accumulation, exact_resume=False)],
    "TrustRatioMonitor": lambda _: [TrustRatioMonitor()],
    "LargeBatch and TrustRatioMonitor": lambda accumulation: [LargeBatch(SAMPLES * accumulation), TrustRatioMonitor()],
}

INTRODUCTION = """\
# What the callbacks cost

Written by `examples/benchmarks/callback_cost.py`; do not edit by hand. To repeat it:

```bash
# costs too long to run here: minutes, on a machine that should do nothing else meanwhile
{command}
```

Machine: {processor}, {cores} cores, {memory_gib} GiB, {os}; Python {python}, torch {torch}, Lightning {lightning}. Load
average {before} before and {after} after.

A model for which callbacks matter: twelve linear layers, Lamb, {samples} samples per micro-batch, one thread, a CSV
logger that logs every {every} optimizer steps. Every round trains each contender once, in an order shuffled anew. The
time of an optimizer step and its micro-batches goes from one `training_step` to the next, in processor time of this
process, in which other programs hardly count. Ratios are over Lightning alone in the same round, median and middle
half of {rounds} rounds: of the median step between logging steps, and of the mean over all steps.

"""


class Network(LightningModule):
    """Twelve layers; keeps when each window began."""

    def __init__(self, accumulation: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
        self.accumulation = accumulation
        self.begun: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if batch_idx % self.accumulation == 0:
            self.begun.append(time.process_time_ns())
        inputs, targets = batch
        return (self.net(inputs) - targets).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return Lamb(list(self.named_parameters()), lr=1e-3)


def windows(callbacks: list[Callback], accumulation: int, steps: int) -> tuple[float, float]:
    """Trains once.

    Returns:
        Milliseconds per micro-batch: the median between logging steps, and the mean of all.
    """
    module = Network(accumulation)
    inputs = torch.randn(SAMPLES * accumulation * (WARM_UP + steps + 1), WIDTH)
    own = {} if any(isinstance(one, LargeBatch) for one in callbacks) else {"accumulate_grad_batches": accumulation}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=WARM_UP + steps + 1,
            max_epochs=-1,
            logger=CSVLogger(folder),
            log_every_n_steps=LOG_EVERY,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **own,
        )
        trainer.fit(module, DataLoader(TensorDataset(inputs, inputs.sin()), SAMPLES))
    times = [(after - before) / 1e6 / accumulation for before, after in zip(module.begun, module.begun[1:])]
    quiet = [t for step, t in enumerate(times) if step >= WARM_UP and (step + 1) % LOG_EVERY != 0]
    return statistics.median(quiet), statistics.mean(times[WARM_UP:])


def measured(accumulation: int, steps: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """All contenders in every round, in an order of its own."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    shuffled = random.Random(0)
    for _ in range(rounds):
        for name in shuffled.sample(list(CONTENDERS), len(CONTENDERS)):
            found[name].append(windows(CONTENDERS[name](accumulation), accumulation, steps))
    return found


def table(accumulation: int, found: dict[str, list[tuple[float, float]]]) -> str:
    """Markdown: times and ratios as medians over rounds, with the middle half."""
    lines = [
        f"{accumulation} micro-batch{'es' if accumulation > 1 else ''} per optimizer step:",
        "",
        "| callbacks | ms per micro-batch | between logging steps (middle half) | all steps (middle half) |",
        "| --- | --- | --- | --- |",
    ]
    for name, times in found.items():
        ratios = [[time[i] / bare[i] for time, bare in zip(times, found[BARE])] for i in range(2)]
        shown = [f"**{statistics.median(r):.3f}** ({' to '.join(f'{q:.3f}' for q in _middle(r))})" for r in ratios]
        lines.append(f"| {name} | {statistics.median(quiet for quiet, _ in times):.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _middle(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, high


def main() -> None:
    """Measures, prints, and writes the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of one training")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches per optimizer step")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    before = describe("cpu")
    tables = [table(k, measured(k, options.steps, options.rounds)) for k in options.accumulation]
    print("\n\n".join(tables))
    if options.markdown is not None:
        head = INTRODUCTION.format(
            **before,
            command="python " + " ".join(["examples/benchmarks/callback_cost.py", *sys.argv[1:]]),
            lightning=lightning.__version__,
            before=(before["load_average"] or ["?"])[0],
            after=(describe("cpu")["load_average"] or ["?"])[0],
            samples=SAMPLES,
            every=LOG_EVERY,
            rounds=options.rounds,
        )
        options.markdown.write_text(head + "\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
