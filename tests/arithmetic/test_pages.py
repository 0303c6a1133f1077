"""The numbers printed in docs/recipes.md and docs/plan.md are the ones that the code gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_lamb.plan import plan_from_recipe
from lightning_lamb.recipes import RECIPES

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPES_PAGE = (DOCS / "recipes.md").read_text(encoding="utf-8")


def rows_of(section: str) -> list[list[float]]:
    text = RECIPES_PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [[float(cell) for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| \d.*\|$", text, re.MULTILINE)]


@pytest.mark.parametrize(("section", "unit"), [("bert-large", 1), ("resnet50", 90)])
def test_the_rows_of_a_recipes_table(section: str, unit: float):
    rows = rows_of(section)
    assert [row[0] for row in rows] == [row.global_batch_size for row in RECIPES[section].rows]
    for batch, steps, lr, warmup, ramp in rows:
        plan = plan_from_recipe(section, global_batch_size=int(batch), micro_batch_size=8, data_parallel_size=1)
        assert (plan.total_steps, plan.warmup_steps) == (steps, ramp)
        assert plan.lr == pytest.approx(lr, rel=1e-5)
        assert plan.stages[0].warmup_fraction * unit == pytest.approx(warmup, rel=1e-12)


def test_every_recipe_is_on_the_page():
    assert set(re.findall(r"^\| `([\w-]+)` \|", RECIPES_PAGE, re.MULTILINE)) == set(RECIPES)


def test_the_printed_plan():
    printed = re.search(r"```text\n(.*?)\n```", (DOCS / "plan.md").read_text(encoding="utf-8"), re.DOTALL)
    table = plan_from_recipe("bert-large-mixed", micro_batch_size=[64, 16], data_parallel_size=512).table()
    assert printed
    assert table.startswith(printed[1])
