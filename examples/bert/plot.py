"""Draws a two-stage training from its metrics.csv: learning rate, losses and trust ratios over the optimizer steps.

python examples/bert/plot.py runs/bert/version_0/metrics.csv --output docs/figures/bert_stages.png
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Curve = dict[int, float]
"""Values by optimizer step."""

# Colours that stay apart for colour-blind readers (Okabe and Ito).
TRAIN, HELD_OUT, BOUND = "#56b4e9", "#d55e00", "#000000"
KINDS = {"embeddings": "#e69f00", "attention": "#0072b2", "intermediate": "#009e73", "output": "#cc79a7"}
OTHERS = "#999999"


def curves(path: Path) -> dict[str, Curve]:
    """All columns of a CSVLogger's file that have values."""
    found: dict[str, Curve] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


def stages(found: dict[str, Curve]) -> list[dict[str, float]]:
    """Runs of steps with the same batch and sequence length: first and last step, and what these are."""
    steps = sorted(found["samples_per_step"])
    keys = [(found["samples_per_step"][step], found["sequence_length"][step]) for step in steps]
    result = []
    for (samples, length), group in itertools.groupby(zip(steps, keys, strict=True), key=lambda pair: pair[1]):
        members = [step for step, _ in group]
        result.append({"first": members[0], "last": members[-1], "samples": samples, "sequence_length": length})
    return result


def kind_of(layer: str) -> str:
    """The part of BERT that a layer belongs to."""
    if "embeddings" in layer:
        return "embeddings"
    if "attention" in layer:
        return "attention"
    if "encoder" in layer:
        return "intermediate" if "intermediate" in layer else "output"
    return "heads"


def smooth(curve: Curve, over: int) -> Curve:
    """The mean of the last values at every step."""
    steps = sorted(curve)
    values = [curve[step] for step in steps]
    means = (sum(part) / len(part) for part in (values[max(0, i + 1 - over) : i + 1] for i in range(len(values))))
    return dict(zip(steps, means, strict=True))


def draw_losses(axes: Axes, found: dict[str, Curve]) -> None:
    """Training and held-out loss of the masked words, and the entropy that they must fall below."""
    smoothed = smooth(found["train_mlm_loss"], 5)
    axes.plot(*zip(*sorted(smoothed.items()), strict=True), color=TRAIN, linewidth=1, label="training, mean of 5 steps")
    held_out = sorted(found["val_mlm_loss"].items())
    axes.plot(*zip(*held_out, strict=True), color=HELD_OUT, marker="o", markersize=3, label="held-out text")
    entropy = next(iter(found["unigram_entropy"].values()))
    axes.axhline(entropy, color=BOUND, linestyle=":", linewidth=1, label=f"unigram entropy, {entropy:.2f}")
    axes.set_ylabel("masked-word loss (nats)")
    axes.legend(fontsize=8)


def draw_ratios(axes: Axes, found: dict[str, Curve]) -> None:
    """One line per layer, coloured by its part of the network."""
    labelled = set()
    for name in sorted(found):
        if name.startswith("trust_ratio/"):
            kind = kind_of(name)
            label = None if kind in labelled else kind
            labelled.add(kind)
            colour = KINDS.get(kind, OTHERS)
            axes.plot(*zip(*sorted(found[name].items()), strict=True), color=colour, linewidth=0.8, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("trust ratio per layer")
    axes.legend(fontsize=8, ncol=5)


def figure(found: dict[str, Curve], output: Path) -> None:
    """Writes the picture."""
    drawing, (rate, loss, ratio) = plt.subplots(3, 1, sharex=True, figsize=(8, 8), height_ratios=(1, 2, 2))
    (lr,) = [curve for name, curve in found.items() if name == "lr" or name.startswith("lr-")][:1]
    rate.plot(*zip(*sorted(lr.items()), strict=True), color=TRAIN, linewidth=1)
    rate.set_ylabel("learning rate")
    draw_losses(loss, found)
    draw_ratios(ratio, found)
    for stage in stages(found):
        title = f"{stage['samples']:g} sequences of {stage['sequence_length']:g} tokens"
        rate.text((stage["first"] + stage["last"]) / 2, rate.get_ylim()[1], title, ha="center", va="bottom", fontsize=9)
        if stage["first"]:
            for axes in (rate, loss, ratio):
                axes.axvline(stage["first"] - 0.5, color=OTHERS, linewidth=0.8)
    ratio.set_xlabel("optimizer step")
    for axes in (rate, loss, ratio):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.tight_layout()
    drawing.savefig(output, dpi=130, metadata={"Software": None})


def summary(found: dict[str, Curve]) -> dict[str, object]:
    """The numbers behind the figure, by stage: JSON-able."""
    entropy = next(iter(found["unigram_entropy"].values()))
    rows = []
    for stage in stages(found):
        inside = {step: loss for step, loss in found["val_mlm_loss"].items() if stage["first"] <= step <= stage["last"]}
        last = max(inside)
        rows.append(stage | {"val_mlm_loss": inside[last], "val_mlm_accuracy": found["val_mlm_accuracy"][last]})
    return {"unigram_entropy": entropy, "stages": rows}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, help="metrics.csv of Lightning's CSVLogger")
    parser.add_argument("--output", type=Path, default=Path("stages.png"), help="the picture; numbers go beside it")
    options = parser.parse_args()
    found = curves(options.metrics)
    figure(found, options.output)
    options.output.with_suffix(".json").write_text(json.dumps(summary(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
