"""LargeBatch beside every feature of Lightning, on one process: what is announced is what happens, or is refused.

The learning rate in every group at every step, the samples of every window by identity, the number of steps, the
accumulation and every window's gradient are compared with plain torch and plain counting (`expectation`).
"""

from __future__ import annotations

import pytest

from tests.lightning.composition.cell import Cell
from tests.lightning.composition.expectation import check, failure_of
from tests.lightning.composition.matrix import ONE_RANK, pairs
from tests.lightning.composition.training import is_installed, train

PARTS = 25


@pytest.mark.parametrize("cell", ONE_RANK, ids=lambda cell: cell.name)
def test_what_is_announced_happens_or_is_refused(cell: Cell) -> None:
    if not is_installed(cell):
        pytest.skip(f"{cell.features[0].needs} is not installed")
    check(cell, [train(cell)])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_announced_happens_beside_several_features(part: int) -> None:
    """Every two features of different kinds that can stand together do so in one of these cells."""
    cells = [cell for cell in pairs()[part::PARTS] if is_installed(cell)]
    failed = [text for cell in cells if (text := failure_of(cell, [train(cell)]))]
    assert not failed, f"{len(failed)} of {len(cells)} cells:\n" + "\n".join(failed)
