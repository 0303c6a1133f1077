"""ShardedStateOptimizer: its state dict is the unsharded optimizer's, on any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems import assert_identical
from tolerances import assert_close
from torch import Tensor, nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import InvalidOptionError, StateDictError, UnsupportedGradientError
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.distributed import run_ranks

SHAPES = {
    "matrix": (7, 5),
    "bias": (5,),
    "conv": (4, 3, 3, 3),
    "one": (1,),
    "scalar": (),
    "nothing": (0, 3),
    "big": (40, 9),
}
HALF = 6
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 1.0, "exempt_1d": False}


def layers(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in SHAPES.items()}
    found["conv"] = found["conv"].contiguous(memory_format=torch.channels_last)
    return {name: nn.Parameter(value) for name, value in found.items()}


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(100 + step)
    for name, parameter in parameters.items():
        # As autograd may leave them: not always with the parameter's strides.
        grad = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
        if parameter.numel() == 1:
            grad = grad.abs()  # a moment of one element in which gradients cancel is nothing but their rounding
        parameter.grad = grad if step % 2 else torch.empty_like(parameter).copy_(grad)
        if name == "big" and step == 3:
            parameter.grad = None


def build(parameters: dict[str, nn.Parameter], cut: bool, kind: Any = Lamb, **options: Any) -> Any:
    options = OPTIONS | options
    if not cut:
        return kind(parameters.items(), **options)
    return ShardedStateOptimizer(parameters.items(), kind, bucket_bytes=600, **options)


def train(
    cut: bool, first: int, last: int, start: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Steps first to last; returns weights and the whole state dict (on rank 0)."""
    parameters = layers(dtype)
    optimizer = build(parameters, cut)
    if start is not None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(start["weights"][name])
        optimizer.load_state_dict(copy.deepcopy(start["state"]))  # torch keeps loaded tensors, and trains in them
    for step in range(first, last):
        give_gradients(parameters, step)
        optimizer.step()
    size = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k != "step")
    ratios = {name: float(ratio) for name, ratio in optimizer.trust_ratios.items()}
    if cut:
        optimizer.consolidate_state_dict()
    leading = not dist.is_initialized() or dist.get_rank() == 0
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in parameters.items()},
        "state": optimizer.state_dict() if leading else {},
        "size": size,
        "ratios": ratios,
    }


def state_by_name(found: dict[str, Any]) -> dict[str, Any]:
    names = list(SHAPES)
    return {f"{names[i]} {key}": value for i, entry in found["state"]["state"].items() for key, value in entry.items()}


def assert_same_training(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_close(got["weights"], expected["weights"], "sharded", "weight")
    assert_close(state_by_name(got), state_by_name(expected), "sharded", "state")
    assert got["ratios"].keys() == expected["ratios"].keys()


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {"half": train(False, 0, HALF), "whole": train(False, 0, 2 * HALF)}


@pytest.fixture(scope="module")
def on_two() -> list[dict[str, Any]]:
    return run_ranks(train, 2, True, 0, HALF)


def test_one_process_is_bitwise_the_unsharded_optimizer(alone):
    cut = train(True, 0, 2 * HALF)
    assert_identical(cut["weights"], alone["whole"]["weights"])
    assert_identical(cut["state"]["state"], alone["whole"]["state"]["state"])
    assert cut["state"]["param_groups"] == alone["whole"]["state"]["param_groups"]
    assert cut["ratios"] == alone["whole"]["ratios"]


def test_ranks_hold_equal_parts_of_the_state_and_equal_weights(alone, on_two):
    assert_same_training(on_two[0], alone["half"])
    assert_identical(on_two[1]["weights"], on_two[0]["weights"])
    assert on_two[0]["ratios"] == on_two[1]["ratios"]
    whole = alone["half"]["size"]
    assert max(part["size"] for part in on_two) <= whole / 2 + 2 * len(SHAPES)
    assert sum(part["size"] for part in on_two) == whole


def test_loaded_state_does_not_keep_the_whole_in_memory(monkeypatch):
    """A slice of a loaded tensor would be a view of it: every rank would hold the state of all."""
    saved = train(False, 0, HALF)
    parameters = layers()
    monkeypatch.setattr(ShardedStateOptimizer, "_ranks", lambda self: 2)
    optimizer = build(parameters, True)
    optimizer.load_state_dict(saved["state"])
    held = [v.untyped_storage().nbytes() for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert sum(held) <= 4 * (saved["size"] / 2 + 2 * len(SHAPES))
    before = {index: float(entry["step"]) for index, entry in saved["state"]["state"].items()}
    for entry in optimizer.state.values():
        entry["step"] += 1
    assert {index: float(entry["step"]) for index, entry in saved["state"]["state"].items()} == before


@pytest.mark.shows("DDP, ShardedStateOptimizer (ZeRO-1)", "checkpoint, same ranks", "bitwise")
def test_resuming_on_the_same_ranks_is_bitwise(on_two):
    uninterrupted = run_ranks(train, 2, True, 0, 2 * HALF)
    resumed = run_ranks(train, 2, True, HALF, 2 * HALF, on_two[0])
    for got, expected in zip(resumed, uninterrupted, strict=True):
        assert_identical(got["weights"], expected["weights"])
        assert_identical(got["state"], expected["state"])


@pytest.mark.shows("DDP, ShardedStateOptimizer (ZeRO-1)", "checkpoint, other ranks", "exact")
def test_resuming_elsewhere_continues_the_same_training(alone, on_two):
    assert_same_training(train(False, HALF, 2 * HALF, on_two[0]), alone["whole"])  # 2 ranks to plain Lamb
    assert_same_training(train(True, HALF, 2 * HALF, on_two[0]), alone["whole"])  # to one rank
    on_four = run_ranks(train, 4, True, HALF, 2 * HALF, on_two[0])  # 2 to 4
    assert_same_training(on_four[0], alone["whole"])
    assert_same_training(run_ranks(train, 2, True, HALF, 2 * HALF, alone["half"])[0], alone["whole"])  # from plain Lamb


def test_masters_pass_through_a_checkpoint_unrounded():
    whole = train(False, 0, 2 * HALF, dtype=torch.bfloat16)
    half = run_ranks(train, 2, True, 0, HALF, None, torch.bfloat16)[0]
    masters = {name: value for name, value in state_by_name(half).items() if name.endswith("master_weight")}
    assert {value.dtype for value in masters.values()} == {torch.float32}
    resumed = run_ranks(train, 2, True, HALF, 2 * HALF, half, torch.bfloat16)[0]
    assert_close(state_by_name(resumed), state_by_name(whole), "sharded", "state")


def test_groups_schedules_closures_and_late_parameters():
    from lightning_lamb import StagedWarmup

    def run(cut: bool) -> dict[str, nn.Parameter]:
        parameters = layers()
        early = [(name, p) for name, p in parameters.items() if name != "big"]
        kind: Any = ShardedStateOptimizer if cut else Lars
        optimizer = kind(
            [{"params": early[:3], "weight_decay": 0.5}, {"params": early[3:]}],
            **({"optimizer_class": Lars} if cut else {}),
            lr=0.1,
        )
        schedule = StagedWarmup(optimizer, total_steps=8, warmup_steps=2)
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": [("big", parameters["big"])], "lr": 0.05})

            def closure(now: int = step) -> Tensor:
                give_gradients(parameters, now)
                return torch.tensor(float(now))

            assert float(optimizer.step(closure)) == step
            schedule.step()
        return parameters

    assert_identical({k: p.detach() for k, p in run(True).items()}, {k: p.detach() for k, p in run(False).items()})


def test_it_follows_parameters_whose_memory_was_replaced():
    """``module.to(...)`` after the optimizer was built gives parameters new memory."""
    parameters, control = layers(), layers()
    cut, plain = build(parameters, True), build(control, False)
    for step in range(4):
        give_gradients(parameters, step)
        give_gradients(control, step)
        cut.step()
        plain.step()
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()
    assert_identical({k: p.detach() for k, p in parameters.items()}, {k: p.detach() for k, p in control.items()})


def test_gradients_stay_the_callers():
    parameters = layers()
    optimizer = build(parameters, True)
    give_gradients(parameters, 0)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    norm = optimizer.global_grad_norm()
    optimizer.step()
    assert float(optimizer.grad_norm) == float(norm)
    assert_identical({name: p.grad for name, p in parameters.items()}, before)


def test_what_it_refuses():
    parameters = layers()
    with pytest.raises(InvalidOptionError, match="eps"):
        ShardedStateOptimizer(parameters.items(), Lamb, eps=-1.0)
    optimizer = build(parameters, True)
    with pytest.raises(InvalidOptionError, match="weight_decay"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": -1.0})
    embedding = nn.Embedding(4, 3, sparse=True)
    sparse = ShardedStateOptimizer(embedding.named_parameters(), Lamb)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedGradientError, match="weight"):
        sparse.step()
    give_gradients(parameters, 0)
    optimizer.step()
    before = {k: p.detach().clone() for k, p in parameters.items()}
    with pytest.raises(StateDictError, match="shape"):
        saved = optimizer.state_dict()
        saved = {**saved, "state": {**saved["state"], 0: {**saved["state"][0], "exp_avg": torch.ones(2, 2)}}}
        optimizer.load_state_dict(saved)
    assert_identical({k: p.detach() for k, p in parameters.items()}, before)
