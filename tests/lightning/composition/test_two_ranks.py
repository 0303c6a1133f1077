"""The same matrix on two gloo processes with DDP: few launches, in each of which many cells are trained."""

from __future__ import annotations

import datetime as dt
import tempfile

import pytest
import torch.distributed as dist

from tests.distributed import RankError, rank, run_ranks, world_size
from tests.lightning.composition.cell import Cell
from tests.lightning.composition.expectation import check, failure_of
from tests.lightning.composition.matrix import TWO_RANKS, is_quick, pairs
from tests.lightning.composition.training import Happened, is_installed, train

SECONDS_OF_A_CELL = 20
"""A cell whose ranks wait for each other fails after this time; the next one begins with a new group."""
PARTS, SHARE = 4, 5
"""Launches of the cells of several features, of which every fifth is trained."""
LAUNCHES: dict[str, list[Cell]] = {
    "callbacks": [c for c in TWO_RANKS if is_quick(c) and c.features[0].kind == "callback"],
    "loaders": [c for c in TWO_RANKS if is_quick(c) and c.features[0].kind == "loader"],
    "others": [c for c in TWO_RANKS if is_quick(c) and c.features[0].kind not in ("callback", "loader")],
    "long": [c for c in TWO_RANKS if not is_quick(c)],
}


def cells_of(launch: str) -> list[Cell]:
    if launch in LAUNCHES:
        return LAUNCHES[launch]
    return pairs(2)[int(launch) :: PARTS * SHARE]


def train_all(launch: str, folder: str) -> list[Happened]:
    """What happened in every cell of a launch, on this rank."""
    mine, everyone = rank(), world_size()  # Lightning forgets the variables after a training
    found = []
    for index, cell in enumerate(cells_of(launch)):
        if not is_installed(cell):
            found.append(Happened())
            continue
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{index}",
                rank=mine,
                world_size=everyone,
                timeout=dt.timedelta(seconds=SECONDS_OF_A_CELL),
            )
        found.append(train(cell))
        if found[-1].by == "Lightning":  # perhaps in the middle of a collective
            dist.destroy_process_group()
    return found


LAUNCHED: dict[str, list[list[Happened]] | RankError] = {}


def happened(launch: str) -> list[list[Happened]]:
    """By cell, then by rank. A launch that failed is not tried again."""
    if launch not in LAUNCHED:
        with tempfile.TemporaryDirectory() as folder:
            try:
                of_ranks = run_ranks(train_all, 2, launch, folder, timeout=280, init_group=False)
                LAUNCHED[launch] = [list(of_cell) for of_cell in zip(*of_ranks, strict=True)]
            except RankError as error:
                LAUNCHED[launch] = error
    found = LAUNCHED[launch]
    if isinstance(found, RankError):
        raise found
    return found


@pytest.mark.parametrize(
    ("launch", "index"),
    [
        pytest.param(launch, index, id=cell.name, marks=pytest.mark.slow if launch == "long" else ())
        for launch, cells in LAUNCHES.items()
        for index, cell in enumerate(cells)
    ],
)
def test_what_is_announced_happens_or_is_refused_on_two_ranks(launch: str, index: int) -> None:
    cell = LAUNCHES[launch][index]
    if not is_installed(cell):
        pytest.skip(f"{cell.features[0].needs} is not installed")
    check(cell, happened(launch)[index])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_what_is_announced_happens_beside_several_features_on_two_ranks(part: int) -> None:
    cells = cells_of(str(part))
    failed = [text for cell, ranks in zip(cells, happened(str(part)), strict=True) if (text := failure_of(cell, ranks))]
    assert not failed, f"{len(failed)} of {len(cells)} cells:\n" + "\n".join(failed)
