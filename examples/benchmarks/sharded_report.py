"""The numbers of sharded_step.py as Markdown."""

from __future__ import annotations

from typing import Any

WHOLE, ZERO, OURS = "Lamb, whole (DDP)", "ShardedStateOptimizer (ZeRO-1)", "Lamb, FSDP2"
TIMM, ALONE = "timm Lamb, FSDP2", "the all-reduce of Lamb under FSDP2"

INTRODUCTION = """\
# Sharded benchmarks

Written by `examples/benchmarks/sharded_step.py`; do not edit by hand. To repeat it:

```bash
# costs too long to run here: minutes, on a machine that should do nothing else meanwhile
{command}
```

Machine: {processor}, {cores} cores, {memory_gib} GiB, {os}; Python {python}, torch {torch}. Load average
{before} before and {after} after. Ranks are processes with one thread on this one machine, connected by gloo: more
ranks than cores share them.

One `optimizer.step()` on given gradients, on the slowest rank. Every round times each contender once, in an order
shuffled anew; *times ours* compares within a round, median and middle half of {rounds}. The all-reduce is that of our
step under FSDP2, timed by itself. *State* is what a rank holds besides weights and gradients.
ZeRO-1 includes gathering the new weights, which FSDP2 does in the forward pass.
"""


def page(results: dict[str, Any]) -> str:
    """The whole page, ending in a newline."""
    facts = results["machine"]
    head = INTRODUCTION.format(
        **facts,
        command=results["command"],
        rounds=results["rounds"],
        before=facts["load_average"][0],
        after=facts["load_average_at_end"][0],
    )
    return "\n".join([head, *(section(entry) for entry in results["models"])]).rstrip() + "\n"


def section(entry: dict[str, Any]) -> str:
    """A table for one model on one number of ranks."""
    alone, share = entry["seconds"][ALONE], entry["times_ours"][ALONE]
    size = f"{entry['parameters'] / 1e6:.1f} M parameters in {entry['tensors']} tensors"
    communication = (
        f"The all-reduce by itself: {alone['median'] * 1e3:.2f} ms, {share['median']:.1%} of our step under FSDP2 "
        f"({share['q1']:.1%} to {share['q3']:.1%})."
    )
    rows = [_row(entry, name) for name in (WHOLE, ZERO, OURS, TIMM)]
    return "\n".join(
        [
            f"## {entry['shapes']} on {entry['ranks']} ranks: {size}",
            "",
            "| optimizer | ms (middle half) | times ours (middle half) | state per rank, MiB |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            communication,
            "",
        ]
    )


def _row(entry: dict[str, Any], name: str) -> str:
    time, ratio = entry["seconds"][name], entry["times_ours"][name]
    cells = [
        name,
        f"{time['median'] * 1e3:.1f} ({time['q1'] * 1e3:.1f} to {time['q3'] * 1e3:.1f})",
        f"**{ratio['median']:.2f}** ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
        f"{entry['state_bytes'][name] / 2**20:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"
