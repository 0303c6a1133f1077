"""The benchmark's numbers as Markdown."""

from __future__ import annotations

from typing import Any

LARGE_ENOUGH = 32 * 2**20  # bytes of weights below which what the process needs anyway drowns a step's temporaries

INTRODUCTION = """\
# Benchmarks

Written by `examples/benchmarks/step_time.py`; do not edit by hand. To repeat it:

```bash
# costs too long to run here: minutes, on a machine that should do nothing else meanwhile
{command}
```

{machine}

What is compared is one `optimizer.step()` on given gradients. Every round times each contender once in an order
shuffled anew; *ratio* is the time over that of torch's fused AdamW in the same round, as median and middle half of
{rounds} rounds. All work on the same weights, gradients and moments: fp32, weight decay, one trust ratio per tensor,
no clipping; only the contender with bf16 state keeps moments of its own. *GB/s* are the bytes that the algorithm must
move (28 per parameter for Adam, 40 for LAMB, which reads moments and weights a second time after the ratio is known,
28 again with bf16 state) over the time; *of stream* is their share of what plain
passes over the same weights reach in the same rounds, the better of a copy (8 bytes) and an in-place addition (12);
more than 100 % means that the second reading came from the cache. *Peak extra* is the memory of one step on top of
weights, gradients and state, in percent of the weights, measured in a process of its own
(`examples/benchmarks/peak_memory.py` says how).
"""


def page(results: dict[str, Any]) -> str:
    """The whole page, ending in a newline, from what step_time.py wrote as JSON."""
    parts = [INTRODUCTION.format(command=results["command"], machine=_machine(results), rounds=results["rounds"])]
    parts += [model_section(entry) for entry in results["models"]]
    if results["not_run"]:
        parts.append("## Not run\n\n" + "\n".join(f"- {name}: {why}" for name, why in results["not_run"].items()))
    return "\n".join(parts).rstrip() + "\n"


def _machine(results: dict[str, Any]) -> str:
    facts = results["machine"]
    hardware = f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['os']}"
    if "gpu" in facts:
        hardware += f"; {facts['gpu']}, CUDA {facts['cuda']}"
    load = f"Load average {facts['load_average'][0]} before and {facts['load_average_at_end'][0]} after."
    versions = ", ".join(
        f"{package} {version}" for package, version in results["versions"].items() if package != "torch"
    )
    return f"Machine: {hardware}. {load}\nVersions: Python {facts['python']}, torch {facts['torch']}, {versions}."


def model_section(entry: dict[str, Any]) -> str:
    """A table per number of threads for one model."""
    lines = [f"## {entry['shapes']}: {entry['parameters'] / 1e6:.1f} M parameters in {entry['tensors']} tensors", ""]
    for threads, rows in entry["times"].items():
        lines += [
            f"{threads} thread{'s' if int(threads) > 1 else ''}:",
            "",
            "| optimizer | ms (middle half) | ratio (middle half) | GB/s | of stream | peak extra |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_row(row, entry.get("memory", {}).get(row["name"])) for row in rows),
            "",
        ]
    return "\n".join(lines)


def _row(row: dict[str, Any], memory: dict[str, int] | None) -> str:
    time, ratio = row["seconds"], row["ratio"]
    measurable = memory is not None and memory["parameters"] >= LARGE_ENOUGH
    cells = [
        row["name"],
        f"{time['median'] * 1e3:.1f} ({time['q1'] * 1e3:.1f} to {time['q3'] * 1e3:.1f})",
        f"**{ratio['median']:.2f}** ({ratio['q1']:.2f} to {ratio['q3']:.2f})",
        f"{row['bandwidth'] / 1e9:.1f}" if row["bandwidth"] else "in cache",
        f"{row['share_of_stream']:.0%}" if row["share_of_stream"] else "in cache",
        f"{memory['peak_extra'] / memory['parameters']:.1%}" if memory and measurable else "-",
    ]
    return "| " + " | ".join(cells) + " |"
