"""The table of layout x feature in docs/sharding.md, from the markers of the tests that show it.

    python -m pytest tests/sharding -m "slow or not slow" --sharding-table docs/sharding.md

writes it when every marked test has passed. With ``--collect-only`` it writes what the tests would show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- written by the tests: begin -->", "<!-- written by the tests: end -->"

# Nothing is cut there: what the optimizer does on one process, it does on each.
WHOLE = ("DDP", "DDP, torch ZeroRedundancyOptimizer", "FSDP1 NO_SHARD")
ROWS = [
    "DDP",
    "DDP, ShardedStateOptimizer (ZeRO-1)",
    "DDP, torch ZeroRedundancyOptimizer",
    "FSDP1 FULL_SHARD",
    "FSDP1 SHARD_GRAD_OP",
    "FSDP1 NO_SHARD",
    "FSDP1 HYBRID_SHARD",
    "FSDP1, not annotated",
    "FSDP1 use_orig_params=False",
    "FSDP1 over tensor parallel",
    "FSDP2",
    "HSDP (FSDP2 on a 2-D mesh)",
    "tensor parallel",
    "FSDP2 with tensor parallel",
]
STEP = {
    "adapted layers": "step",
    "all layers adapted": "`exempt_1d=False`",
    "max_grad_norm": "`max_grad_norm`",
    "L1, Linf": "L1, Linf norm",
    "Nesterov": "N-, NN-LAMB",
    "bounds, value clip": "bounds, `max_grad_value`",
    "Lars": "`Lars`",
    "float32": "training, fp32",
    "bf16-mixed": "bf16 autocast",
}
LIGHTNING = {
    "Trainer, 32-true": "32-true",
    "Trainer, bf16-mixed": "bf16-mixed",
    "Trainer, bf16-true": "bf16-true",
    "GradScaler": "GradScaler skips",
    "Trainer(gradient_clip_val)": "`gradient_clip_val`",
    "optimizer built before wrapping, LargeBatch": "built before wrapping, with LargeBatch",
    "bare stock": "and without",
    "checkpoint, same ranks": "resume, same ranks",
    "checkpoint, other ranks": "resume elsewhere",
    "torch.distributed.checkpoint": "DCP by itself",
}
ALWAYS_WHOLE = set(STEP) - {"max_grad_norm", "adapted layers", "all layers adapted", "float32", "bf16-mixed"}

Claim = tuple[str, str, str]


def render(claims: Iterable[Claim]) -> str:
    """Both tables in Markdown.

    Raises:
        ValueError: a claim of a layout or a feature that no table has.
    """
    cells: dict[tuple[str, str], set[str]] = {}
    for layout, feature, verdict in claims:
        if layout == "single process":
            continue
        if layout not in ROWS or feature not in STEP | LIGHTNING:
            raise ValueError(f"no cell for {layout!r}, {feature!r}")
        cells.setdefault((layout, feature), set()).add(verdict)
    return f"{_table(STEP, cells)}\n\n{_table(LIGHTNING, cells)}"


def _table(columns: dict[str, str], cells: dict[tuple[str, str], set[str]]) -> str:
    lines = ["| layout | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        found = [_cell(row, feature, cells) for feature in columns]
        if any(cell not in ("-", "whole") for cell in found):
            lines.append(f"| {row} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _cell(row: str, feature: str, cells: dict[tuple[str, str], set[str]]) -> str:
    shown = cells.get((row, feature))
    if shown:
        return ", ".join(sorted(shown))
    return "whole" if row in WHOLE and feature in ALWAYS_WHOLE else "-"


def between_markers(page: str) -> str:
    return page.split(BEGIN)[1].split(END, maxsplit=1)[0].strip()


def write(path: Path, claims: Iterable[Claim]) -> None:
    """Replaces what is between the markers."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{render(claims)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
