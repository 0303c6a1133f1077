"""The tables of docs/mnist_study.md from the finished runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mnist_protocol import EPOCHS, LR, OPTIMIZERS, published

Results = list[dict[str, Any]]


def tables(runs: Results) -> str:
    """Markdown: one table against the published cells, and one of the controls if there are any."""
    parts = [protocol_table(runs)]
    if any(not is_protocol(run) for run in runs):
        parts.append(control_table(runs))
    return "\n\n".join(parts)


def is_protocol(run: dict[str, Any]) -> bool:
    """Whether a run has the notebook's initial weights and learning rate."""
    return run["init"] == "normal" and run["lr"] == LR


def protocol_table(runs: Results) -> str:
    """Ours beside the published number, by model, batch and optimizer."""
    numbers = published()
    ours = [run for run in runs if is_protocol(run)]
    lines = [
        "| model | batch | steps | " + " | ".join(f"{name}: ours | published" for name in OPTIMIZERS) + " |",
        "|---" * (3 + 2 * len(OPTIMIZERS)) + "|",
    ]
    for model, batch in dict.fromkeys((run["model"], run["batch"]) for run in sorted(ours, key=by_batch)):
        steps = next(run["steps"] for run in ours if (run["model"], run["batch"]) == (model, batch))
        cells = [f"{model} | {batch} | {steps}"]
        for optimizer in OPTIMIZERS:
            wanted = {"model": model, "batch": batch, "optimizer": optimizer}
            cells.append(f"{accuracies(ours, **wanted)} | {numbers[batch, optimizer, model]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def control_table(runs: Results) -> str:
    """The MLP with other initial weights and learning rates."""
    rows: dict[str, Callable[[dict[str, Any]], bool]] = {
        "N(0, 1), lr 0.001: the protocol": is_protocol,
        "N(0, 1), lr 0.01": lambda run: run["init"] == "normal" and run["lr"] == 10 * LR,
        "scaled with fan-in, lr 0.001": lambda run: run["init"] == "fan_in" and run["lr"] == LR,
        "scaled with fan-in, lr 0.01": lambda run: run["init"] == "fan_in" and run["lr"] == 10 * LR,
    }
    sizes = sorted({run["batch"] for run in runs if not is_protocol(run)})
    lines = [f"| batch | initial weights, learning rate | {' | '.join(OPTIMIZERS)} |", "|---" * 5 + "|"]
    for batch in sizes:
        for title, belongs in rows.items():
            chosen = [run for run in runs if belongs(run) and run["model"] == "MLP"]
            cells = [accuracies(chosen, batch=batch, optimizer=optimizer) for optimizer in OPTIMIZERS]
            if any(cells):
                lines.append(f"| {batch} | {title} | {' | '.join(cell or 'not run' for cell in cells)} |")
    return "\n".join(lines)


def accuracies(runs: Results, **wanted: Any) -> str:
    """The accuracies of the runs with these values, by seed, such as "97.8, 97.9"."""
    chosen = [run for run in runs if all(run[key] == value for key, value in wanted.items())]
    return ", ".join(f"{run['accuracy']:.2f}" for run in sorted(chosen, key=lambda run: run["seed"]))


def by_batch(run: dict[str, Any]) -> tuple[str, int]:
    """Sorting key."""
    return run["model"], run["batch"]


__all__ = ["EPOCHS", "accuracies", "control_table", "is_protocol", "protocol_table", "tables"]
