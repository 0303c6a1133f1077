"""Time and memory of one optimizer step: our Lamb, torch's AdamW and other packages' LAMBs, in one run.

    python examples/benchmarks/step_time.py --shapes bert-base resnet50 many-small 768x768 --threads 1 2

A machine is never quiet for long, so every round times each contender once, in an order shuffled anew, and what is
compared is the ratio to torch's fused AdamW within a round: medians over rounds, with the middle half as spread.
All contenders work on the same weights, gradients and moments, so none has luckier memory and large models fit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import machine
import peak_memory
import report
import shapes
from contenders import BASELINE, CONTENDERS, Contender, reason_not_to_run

COPY, ADDITION = "copy of the weights", "in-place addition"
STREAMS = {COPY: 8, ADDITION: 12}  # bytes per parameter: read and write; read, read and write
SHORTEST_MEASUREMENT = 0.02  # seconds; shorter steps are repeated within a measurement
OUT_OF_CACHE = 256 * 2**20  # bytes of weights, gradients and moments from which bandwidth means the memory's


class SharedModel:
    """Weights, gradients and moments that all contenders work on."""

    def __init__(self, model_shapes: Sequence[shapes.Shape], device: str) -> None:
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in model_shapes]
        for param in self.params:
            param.grad = torch.randn_like(param) * 1e-3
        self.moments: list[dict[str, Tensor]] | None = None

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return sum(param.numel() for param in self.params)

    def optimizer(self, contender: Contender) -> Optimizer:
        """Builds a contender and, after its first step, replaces its moments by the shared ones."""
        optimizer = contender.build(list(self.params))
        optimizer.step()
        if not contender.shares_state:
            return optimizer
        states = [optimizer.state[param] for param in self.params]
        if self.moments is None:
            self.moments = [{key: state[key] for key in ("exp_avg", "exp_avg_sq")} for state in states]
        if all(state.keys() >= {"exp_avg", "exp_avg_sq"} for state in states):
            for state, moments in zip(states, self.moments):
                state |= moments
            witness = self.moments[0]["exp_avg"]
            witness.zero_()
            optimizer.step()
            assert witness.any(), f"{contender.name} does not work on the moments in its state"
        return optimizer


def measurement(action: Callable[[], Any], device: str) -> Callable[[], float]:
    """Wraps an action into one that returns its mean seconds, repeated enough to be measurable."""

    def seconds(repeats: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            action()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    seconds(1)
    repeats = max(1, math.ceil(SHORTEST_MEASUREMENT / seconds(1)))
    return lambda: seconds(repeats)


def interleaved(measurements: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per contender and round; each round in another order."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name in order.sample(list(measurements), len(measurements)):
            seconds[name].append(measurements[name]())
    return seconds


def median_and_middle_half(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def streams(model: SharedModel) -> dict[str, Callable[[], None]]:
    """The plainest passes over memory there are, to compare bandwidth with; they leave the model as it is."""
    copies = [torch.zeros_like(param) for param in model.params]
    weights = [param.detach() for param in model.params]

    def copy() -> None:
        for target, source in zip(copies, weights):
            target.copy_(source)

    def addition() -> None:
        for target, source in zip(copies, weights):
            target.add_(source)

    return {COPY: copy, ADDITION: addition}


def time_model(
    model: SharedModel, contenders: Sequence[Contender], args: argparse.Namespace, threads: int
) -> list[dict]:
    """Times every contender on one model at one number of threads.

    Returns:
        Per contender: name, seconds and ratio to the baseline (each median, q1, q3), and, for a model beyond the
        caches, the bytes it must move per second, also as a share of the fastest of STREAMS.
    """
    torch.set_num_threads(threads)
    actions = {contender.name: model.optimizer(contender).step for contender in contenders} | streams(model)
    measurements = {name: measurement(action, args.device) for name, action in actions.items()}
    seconds = interleaved(measurements, args.rounds)
    out_of_cache = 16 * model.parameters > OUT_OF_CACHE
    stream = max(size * model.parameters / statistics.median(seconds[name]) for name, size in STREAMS.items())
    rows = []
    for contender in contenders:
        own = seconds[contender.name]
        bandwidth = contender.bytes_per_parameter * model.parameters / statistics.median(own)
        rows.append(
            {
                "name": contender.name,
                "seconds": median_and_middle_half(own),
                "ratio": median_and_middle_half([mine / base for mine, base in zip(own, seconds[BASELINE])]),
                "bandwidth": bandwidth if out_of_cache else None,
                "share_of_stream": bandwidth / stream if out_of_cache else None,
            }
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_shapes = ["bert-base", "resnet50", "768x768", "many-small"]
    shapes_help = "bert-base, bert-large, resnet50, many-small, or [COUNT*]AxB, such as 768x768 or 10*1000"
    parser.add_argument("--shapes", nargs="+", default=default_shapes, help=shapes_help)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=15, help="measurements per contender; at least 2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders to run, besides the baseline")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--markdown", type=Path, help="where to write the page")
    return parser.parse_args()


def main() -> None:
    """Runs everything that was asked for and writes it down."""
    args = parse_arguments()
    chosen = [each for each in CONTENDERS if each.name == BASELINE or re.search(args.only, each.name)]
    reasons = {contender.name: reason_not_to_run(contender, args.device) for contender in chosen}
    running = [contender for contender in chosen if reasons[contender.name] is None]
    results: dict[str, Any] = {
        "command": shlex.join(["python", "examples/benchmarks/step_time.py", *sys.argv[1:]]),
        "machine": machine.describe(args.device),
        "rounds": args.rounds,
        "device": args.device,
        "versions": {contender.package: contender.version() for contender in running},
        "not_run": {name: reason for name, reason in reasons.items() if reason},
        "models": [],
    }
    for text in args.shapes:
        model = SharedModel(shapes.parse(text), args.device)
        entry: dict[str, Any] = {"shapes": text, "parameters": model.parameters, "tensors": len(model.params)}
        entry["times"] = {threads: time_model(model, running, args, threads) for threads in args.threads}
        del model
        if not args.no_memory:
            entry["memory"] = {each.name: peak_memory.measure(each.name, text, args.device) for each in running}
        results["models"].append(entry)
        print(report.model_section(entry), flush=True)
    results["machine"]["load_average_at_end"] = machine.describe(args.device)["load_average"]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(report.page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
