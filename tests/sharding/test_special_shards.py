"""Shards, gradients and groups of every awkward kind; the situations themselves are in scenarios.py."""

from __future__ import annotations

import pytest
from sharding import scenarios

from tests.distributed import run_ranks

FOUND: dict[int, list[dict[str, str]]] = {}


@pytest.mark.parametrize("name", [*scenarios.names(2), *scenarios.names(4)])
def test_it_holds_that(name):
    ranks = int(name.split("_")[1])
    if ranks not in FOUND:
        FOUND[ranks] = run_ranks(scenarios.run_scenarios, ranks, ranks, timeout=180)
    for index, failures in enumerate(FOUND[ranks]):
        assert not failures[name], f"rank {index}:\n{failures[name]}"
