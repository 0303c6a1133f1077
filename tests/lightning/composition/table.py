"""The table of docs/composition.md, from the rows that the tests run.

    python -m tests.lightning.composition.table

writes it. It says nothing that no test shows: `test_features.py` compares page and rows.
"""

from __future__ import annotations

from pathlib import Path

from tests.lightning.composition.cell import Feature
from tests.lightning.composition.matrix import KINDS, TWICE

PAGE = Path(__file__).parents[3] / "docs" / "composition.md"
BEGIN, END = "<!-- written by the tests: begin -->", "<!-- written by the tests: end -->"
HEADINGS = {
    "callback": "Callbacks",
    "loader": "Training data",
    "scheduler": "Learning-rate schedules",
    "precision": "Precision",
    "optimizer": "Optimizers",
    "module": "Who makes the optimizer",
    "trainer": "Options of the Trainer",
    "plan": "Options of LargeBatch",
}


def render() -> str:
    """All tables in Markdown."""
    parts = []
    for kind, features in KINDS.items():
        parts += [f"### {HEADINGS[kind]}", "", *_table(features), ""]
    twice = [cell.features[-1] for cell in TWICE]
    parts += ["### Two that would do the same thing", "", *_table(twice)]
    return "\n".join(parts)


def _table(features: list[Feature]) -> list[str]:
    lines = ["| beside LargeBatch | 1 rank | 2 ranks | |", "|---|---|---|---|"]
    for feature in features:
        cells = [_outcome(feature) if ranks in feature.ranks else "-" for ranks in (1, 2)]
        lines.append(f"| {feature.name} | {' | '.join(cells)} | {feature.remark} |")
    return lines


def _outcome(feature: Feature) -> str:
    if feature.refused is None:
        return "works"
    return "refused" if feature.by == "lightning_lamb" else f"refused by {feature.by}"


def between_markers(page: str) -> str:
    return page.split(BEGIN)[1].split(END, maxsplit=1)[0].strip()


def write(path: Path = PAGE) -> None:
    """Replaces what is between the markers."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    write()
