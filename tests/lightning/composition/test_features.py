"""The rows: none of Lightning's callbacks and torch's schedulers is missing, and the page says what the tests run."""

from __future__ import annotations

from collections import Counter

import torch
from lightning.pytorch import callbacks

from tests.lightning.composition.expectation import failure_of
from tests.lightning.composition.matrix import ALONE, EVERYTHING, KINDS, fits, pairs
from tests.lightning.composition.table import PAGE, between_markers, render
from tests.lightning.composition.training import Happened


def test_every_callback_of_lightning_has_a_row() -> None:
    rows = {feature.name for feature in KINDS["callback"]}
    assert set(callbacks.__all__) <= rows


def test_every_scheduler_of_torch_has_a_row() -> None:
    rows = {feature.name.split(",")[0] for feature in KINDS["scheduler"]}
    assert set(torch.optim.lr_scheduler.__all__) - {"LRScheduler"} <= rows


def test_rows_have_names_of_their_own() -> None:
    names = Counter((feature.kind, feature.name) for feature in EVERYTHING)
    assert not [name for name, count in names.items() if count > 1]
    assert len({cell.name for cell in ALONE}) == len(ALONE)


def test_every_two_features_that_fit_meet() -> None:
    met = {frozenset((id(a), id(b))) for cell in pairs() for a in cell.features for b in cell.features}
    working = [f for f in EVERYTHING if not f.refused and not f.alone and 1 in f.ranks]
    missing = [
        (a.name, b.name)
        for index, a in enumerate(working)
        for b in working[index + 1 :]
        if a.kind != b.kind and fits(a, b) and frozenset((id(a), id(b))) not in met
    ]
    assert not missing


def test_the_table_in_the_docs_is_what_the_tests_run() -> None:
    assert between_markers(PAGE.read_text(encoding="utf-8")) == render().strip(), (
        "run: python -m tests.lightning.composition.table"
    )


def test_a_training_without_a_window_fails_a_cell_that_works() -> None:
    """The comparison can fail: nothing trained, and nothing refused."""
    works = next(cell for cell in ALONE if cell.refused is None)
    refused = next(cell for cell in ALONE if cell.refused is not None)
    assert failure_of(works, [Happened()])
    assert failure_of(refused, [Happened()])
    assert failure_of(refused, [Happened(error="something else", by="lightning_lamb")])
    assert failure_of(works, [Happened(error="refused", by="lightning_lamb")])
