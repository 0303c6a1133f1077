"""Ranks that share layers mean the same ones, or every rank is told which layer differs; nobody waits for ever."""

from __future__ import annotations

import pytest
from sharding import disagreements

from tests.distributed import run_ranks

WORDS = {  # what the message says on rank 0, besides the layer's name
    "fewer layers": ["third", "it is not there"],
    "fewer layers, ShardedStateOptimizer": ["third", "it is not there"],
    "another group": ["second", "weight_decay 0.1", "weight_decay 0.0"],
    "weight_decay": ["first", "weight_decay 0.1", "weight_decay 0.0"],
    "lr": ["first", "lr 0.1", "lr 0.2"],
    "adapt": ["first", "trust ratio True", "trust ratio False"],
    "norm": ["first", "norm l2", "norm linf"],
    "exempt_1d": ["first", "exempt_1d True", "exempt_1d False"],
    "max_grad_norm": ["first", "max_grad_norm 1.0", "max_grad_norm None"],
    "weight_decay, ShardedStateOptimizer": ["first", "weight_decay 0.1", "weight_decay 0.0"],
    "bucket_bytes": ["first", "bucket_bytes 100", "bucket_bytes 1000"],
    "no names, other shapes": ["group0.param0", "shape (6, 5)", "shape (4, 3)"],
    "no names, ShardedStateOptimizer": ["group0.param0", "weights with checksum"],
    "names on some ranks": ["first", "group0.param0"],
    "frozen from the start": ["second", "trained True", "trained False"],
}
ALONE = {  # what it says on the rank that changed alone, of the layer
    "frozen later": ["second", "was: trained True", "is: trained False"],
    "frozen later, clipped": ["second", "trained False"],
    "frozen later, linf": ["second", "trained False"],
    "frozen later, ShardedStateOptimizer": ["second", "trained False"],
    "added later": ["new", "was: it is not there", "shape (4, 4)"],
    "added later, clipped": ["new", "shape (4, 4)"],
    "added later, ShardedStateOptimizer": ["new", "shape (4, 4)"],
    "adapt later": ["first", "trust ratio False"],
    "max_grad_norm later": ["first", "max_grad_norm 1.0"],
    "frozen before the norm": ["second", "trained False"],
}
assert WORDS.keys() | ALONE.keys() == disagreements.ATTEMPTS.keys()


@pytest.fixture(scope="module")
def on_two():
    return run_ranks(disagreements.collect, 2, timeout=120)


@pytest.fixture(scope="module")
def on_four():
    return run_ranks(disagreements.collect, 4, timeout=180)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", disagreements.ATTEMPTS)
def test_ranks_that_mean_different_layers_are_all_refused_before_anything_moved(name, ranks, request):
    """Sums of norms do not show what they are of: trust ratios were off by a factor of 70, without a word."""
    for kind, message, unmoved in [
        found[name] for found in request.getfixturevalue({2: "on_two", 4: "on_four"}[ranks])
    ]:
        assert kind == "RankDisagreementError", message
        assert "on every rank" in message
        assert unmoved


@pytest.mark.parametrize("name", WORDS)
def test_the_message_names_the_first_layer_that_differs_on_both_sides(name, on_two):
    message = on_two[0][name][1]
    assert "rank 0" in message
    assert "rank 1" in message
    assert not [word for word in WORDS[name] if word not in message], message


@pytest.mark.parametrize("name", ALONE)
def test_a_rank_that_changes_alone_is_told_what_changed_and_the_others_that_something_did(name, on_two):
    assert not [word for word in ALONE[name] if word not in on_two[1][name][1]], on_two[1][name][1]
    assert "other ranks' layers have changed" in on_two[0][name][1]


def test_layers_frozen_unfrozen_and_added_on_all_ranks_at_once_train_exactly():
    for found in run_ranks(disagreements.together, 2, timeout=90):
        assert max(found["errors"].values()) <= found["exact"], found["errors"]
        # Norm and table; at first a comparison; at a change, the announcement and a comparison.
        assert found["collectives"] == [3, 2, 4, 2, 4, 4, 2, 2]


def test_a_plan_rebuilt_on_one_rank_alone_costs_and_hangs_nothing():
    """A rank that compared alone would wait for the others for ever."""
    assert run_ranks(disagreements.rebuilt_on_one_rank, 2, timeout=60) == [[2, 1, 1, 1]] * 2


def test_fsdp2_knows_names_that_the_optimizer_was_not_given():
    for found in run_ranks(disagreements.unnamed_under_fsdp2, 2, timeout=60):
        assert set(found) == {"0.weight", "1.weight", "2.weight"}
        assert max(found.values()) < 1e-5
