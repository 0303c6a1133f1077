"""How the time of a step grows with the number of tensors and of parameters: our fused Lamb beside torch's fused AdamW.

    python examples/benchmarks/scaling.py --json docs/scaling.json --markdown docs/scaling.md

Two sweeps: one million parameters cut into 1 to 1000 tensors, and single tensors of a thousand to a billion elements.
A size is left out where weights, gradients and one set of moments do not fit in two thirds of the free memory.
Measured as in step_time.py: interleaved, ratios within a round, medians with the middle half.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import machine
from contenders import BASELINE, CONTENDERS, OURS
from step_time import SharedModel, interleaved, measurement, median_and_middle_half

TENSORS = (1, 3, 10, 30, 100, 300, 1000)
MILLION = 1_000_000
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9)
BYTES_PER_PARAMETER = 16 + 1  # weight, gradient, two moments in float32; and room
HEADER = """\
| tensors | parameters | AdamW fused, ms | Lamb fused, ms | ratio (middle half) |
| --- | --- | --- | --- | --- |"""

INTRODUCTION = """\
# Scaling of a step

Written by `examples/benchmarks/scaling.py`; do not edit by hand. To repeat it:

```bash
# costs too long to run here: minutes, on a machine that should do nothing else meanwhile
{command}
```

{processor}, {cores} cores, {memory_gib} GiB, torch {torch}, {threads} threads. Load average {load_average[0]} before.
Medians of {rounds} rounds; *ratio* is within a round, with its middle half.
"""


def free_bytes() -> float:
    """Memory that may be used without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def time_one(tensors: int, parameters: int, rounds: int) -> dict[str, Any]:
    """Times both on ``tensors`` equal tensors."""
    model = SharedModel([(parameters // tensors,)] * tensors, "cpu")
    chosen = [each for each in CONTENDERS if each.name in (BASELINE, f"{OURS} fused")]
    measurements = {each.name: measurement(model.optimizer(each).step, "cpu") for each in chosen}
    seconds = interleaved(measurements, rounds)
    ratios = [ours / theirs for ours, theirs in zip(seconds[f"{OURS} fused"], seconds[BASELINE])]
    found = {name: median_and_middle_half(values) for name, values in seconds.items()}
    return {"tensors": tensors, "parameters": parameters, "seconds": found, "ratio": median_and_middle_half(ratios)}


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    base, ours = (entry["seconds"][name]["median"] * 1e3 for name in (BASELINE, f"{OURS} fused"))
    ratio = entry["ratio"]
    return (
        f"| {entry['tensors']} | {entry['parameters']:,} | {base:.3g} | {ours:.3g} "
        f"| **{ratio['median']:.2f}** ({ratio['q1']:.2f} to {ratio['q3']:.2f}) |"
    )


def main() -> None:
    """Runs both sweeps and writes them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measurements per contender; at least 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="parameters of the largest tensor")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--markdown", type=Path, help="where to write the page")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "examples/benchmarks/scaling.py", *sys.argv[1:]])
    facts = machine.describe("cpu") | {"rounds": args.rounds, "threads": args.threads, "command": command}
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for title, cases in (
        ("One million parameters in 1 to 1000 tensors", [(tensors, MILLION) for tensors in TENSORS]),
        ("One tensor", [(1, size) for size in SIZES if size <= args.largest]),
    ):
        print(title, flush=True)
        sweeps[title] = []
        for tensors, parameters in cases:
            if BYTES_PER_PARAMETER * parameters > free_bytes() * 2 / 3:
                print(f"{parameters:,} parameters do not fit in the free memory")
                continue
            sweeps[title].append(time_one(tensors, parameters, args.rounds))
            print(row(sweeps[title][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "sweeps": sweeps}, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        parts = [INTRODUCTION.format(**facts)]
        parts += [f"## {title}\n\n{HEADER}\n" + "\n".join(map(row, found)) + "\n" for title, found in sweeps.items()]
        args.markdown.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
