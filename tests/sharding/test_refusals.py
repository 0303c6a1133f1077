"""What cannot be exact is refused before the first update, with the tensor, the rank and the remedy."""

from __future__ import annotations

import pytest
import torch
from sharding import refusals
from torch import nn

from lightning_lamb.errors import UnknownShardError
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.distributed import run_ranks

EXPECTED = {  # name: class, words that the message must have on rank 1
    "FSDP1 that nobody annotated": ("UnknownShardError", ["0.weight", "rank 1", "annotate(model)"]),
    "FSDP1 with use_orig_params=False": ("UnknownShardError", ["rank 1", "use_orig_params=True"]),
    "annotating FSDP1 with use_orig_params=False": ("UnknownShardError", ["rank 1", "use_orig_params=True"]),
    "a partial DTensor": ("UnknownShardError", ["half", "rank 1", "Redistribute"]),
    "a plain gradient on a DTensor": ("UnknownShardError", ["cut", "rank 1", "distribute_tensor"]),
    "parameters that were replaced after the optimizer was built": ("UnknownShardError", ["0.weight", "LargeBatch"]),
    "FSDP1 over tensor parallel": ("UnknownShardError", ["0.weight", "fully_shard"]),
    "state sharded twice, FSDP1": ("ConflictError", ["0.weight", "Use Lamb itself"]),
    "state sharded twice, FSDP2": ("ConflictError", ["0.weight", "Use Lamb itself"]),
    "a clip norm inside torch's ZeroRedundancyOptimizer": ("ConflictError", ["max_grad_norm", "ShardedStateOptimizer"]),
    "the state dict of one rank": ("StateDictError", ["rank 1", "consolidate_state_dict"]),
}
SHOWN = {
    "FSDP1 that nobody annotated": ("FSDP1, not annotated", "adapted layers"),
    "FSDP1 with use_orig_params=False": ("FSDP1 use_orig_params=False", "adapted layers"),
    "FSDP1 over tensor parallel": ("FSDP1 over tensor parallel", "adapted layers"),
    "a clip norm inside torch's ZeroRedundancyOptimizer": ("DDP, torch ZeroRedundancyOptimizer", "max_grad_norm"),
}


@pytest.fixture(scope="module")
def found() -> list[dict[str, tuple[str, str, bool]]]:
    return run_ranks(refusals.collect, 2, 2, timeout=120)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.shows(*SHOWN[name], "refused")] if name in SHOWN else [])
        for name in refusals.REFUSED
    ],
)
def test_it_is_refused_on_every_rank_before_anything_moved(name, found):
    for outcome in found:
        kind, message, unchanged = outcome[name]
        assert kind == EXPECTED[name][0], message
        assert unchanged
    message = found[1][name][1]
    missing = [word for word in EXPECTED[name][1] if word not in message]
    assert not missing, message


def test_a_parameter_whose_elements_overlap_cannot_be_cut_into_slices():
    parameter = nn.Parameter(torch.ones(3, 1).expand(3, 4))
    optimizer = ShardedStateOptimizer([("overlapping", parameter)])
    parameter.grad = torch.ones(3, 4)
    with pytest.raises(UnknownShardError, match=r"overlapping.*contiguous"):
        optimizer.step()
