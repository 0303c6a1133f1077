"""docs/sharding.md says what the tests show, no more and no less."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sharding.claims_table import BEGIN, END, between_markers, render

ROOT = Path(__file__).parents[2]


def test_the_table_in_the_docs_is_what_the_tests_show(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    command = [sys.executable, "-m", "pytest", "tests/sharding", "--collect-only", "-q", "-m", "slow or not slow"]
    done = subprocess.run(
        [*command, "--sharding-table", str(page)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    committed = (ROOT / "docs" / "sharding.md").read_text()
    assert between_markers(page.read_text()) == between_markers(committed), (
        'run: python -m pytest tests/sharding -m "slow or not slow" --sharding-table docs/sharding.md'
    )


def test_a_claim_without_a_cell_is_an_error():
    with pytest.raises(ValueError, match="no cell"):
        render([("FSDP7", "adapted layers", "exact")])
