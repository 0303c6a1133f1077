"""A plan as text: one column per stage, then memory, traffic and sources."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_lamb.footprint import STRATEGIES

if TYPE_CHECKING:
    from lightning_lamb.plan import Plan

_WIDTH = 100


def plan_table(plan: Plan) -> str:
    """Return the plan as text, at most 100 columns wide (long sources wrap)."""
    name = f"{plan.recipe}: " if plan.recipe else ""
    parts = [f"{name}{plan.title}", _columns(_stage_rows(plan))]
    if plan.memory_per_rank is not None:
        parts += [
            f"Memory per rank ({plan.parameters:,} parameters, {plan.precision}; activations come on top)",
            _columns(_memory_rows(plan)),
        ]
    if any(stage.bytes_sent_per_step for stage in plan.stages):
        parts += ["Sent per rank and optimizer step (ring collectives)", _columns(_traffic_rows(plan))]
    if plan.sources:
        parts += ["Sources", _definitions(plan)]
    return "\n\n".join(parts)


def _stage_rows(plan: Plan) -> list[list[str]]:
    stages = plan.stages
    several = len(stages) > 1
    rows = [["", *(f"stage {index + 1}" for index in range(len(stages)))]] if several else []
    if any(stage.sequence_length for stage in stages):
        rows.append(["sequence length", *(f"{stage.sequence_length or '-'}" for stage in stages)])
    rows += [
        ["global batch (samples)", *(f"{stage.global_batch_size:,}" for stage in stages)],
        ["= micro-batch per rank", *(f"{stage.micro_batch_size:,}" for stage in stages)],
        ["x data-parallel ranks", *(f"{stage.data_parallel_size:,}" for stage in stages)],
        ["x accumulate_grad_batches", *(f"{stage.accumulate_grad_batches:,}" for stage in stages)],
        [f"peak learning rate ({plan.lr_scaling})", *(f"{stage.lr:.6g}" for stage in stages)],
        ["warm-up (optimizer steps)", *(f"{stage.warmup_steps:,}" for stage in stages)],
        ["warm-up (share)", *(f"{stage.warmup_fraction * 100:.4g} %" for stage in stages)],
        ["schedule", *(_schedule(stage.shape, restarts=stage.restarts_schedule) for stage in stages)],
        ["optimizer steps", *(f"{stage.total_steps:,}" for stage in stages)],
        ["samples seen", *(f"{stage.samples:,}" for stage in stages)],
    ]
    if several:
        totals = {
            "": "total",
            "optimizer steps": f"{plan.total_steps:,}",
            "samples seen": f"{sum(stage.samples for stage in stages):,}",
        }
        rows = [[*row, totals.get(row[0], "")] for row in rows]
    return rows


def _schedule(shape: str, *, restarts: bool) -> str:
    decay = {"poly": "1 - t/T", "cosine": "cosine", "constant": "constant"}[shape]
    return decay if restarts else "runs on"


def _memory_rows(plan: Plan) -> list[list[str]]:
    rows = [["", "weights", "gradients", "master", "moments", "total"]]
    for strategy, held in (plan.memory_per_rank or {}).items():
        counts = (held.weights, held.gradients, held.master_weights, held.moments, held.total)
        rows.append([STRATEGIES[strategy], *(_readable(count) for count in counts)])
    return rows


def _traffic_rows(plan: Plan) -> list[list[str]]:
    several = len(plan.stages) > 1
    rows = [["", *(["stage"] if several else []), "gradients", "weights", "LAMB norms", "total"]]
    for index, stage in enumerate(plan.stages):
        for strategy, sent in (stage.bytes_sent_per_step or {}).items():
            counts = [_readable(count) for count in (sent.gradients, sent.weights, sent.norms, sent.total)]
            rows.append([STRATEGIES[strategy], *([str(index + 1)] if several else []), *counts])
    return rows


def _readable(count: int) -> str:
    """Return bytes with a unit and three digits.

    Example:
        >>> _readable(0), _readable(1500), _readable(5_379_617_728)
        ('-', '1.46 KiB', '5.01 GiB')
    """
    if count == 0:
        return "-"
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Align: names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(("  " + "   ".join(cells)).rstrip())
    return "\n".join(lines)


def _definitions(plan: Plan) -> str:
    indent = 2 + max(len(name) for name in plan.sources) + 2
    lines = []
    for name, source in plan.sources.items():
        first = f"  {name}".ljust(indent)
        lines.append(textwrap.fill(source, _WIDTH, initial_indent=first, subsequent_indent=" " * indent))
    return "\n".join(lines)
