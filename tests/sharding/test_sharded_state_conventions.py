"""ShardedStateOptimizer is a torch optimizer like others: hooks, state dicts, copies, layers that come and go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_lamb import Lamb
from lightning_lamb.errors import ConflictError, InvalidOptionError, StateDictError
from lightning_lamb.optimizers import ShardedStateOptimizer
from tests.distributed import run_ranks

SHAPES = {"first": (5, 4), "second": (3, 4), "third": (7,)}


def layers() -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def give(parameters: Any, step: int = 0) -> None:
    draw = torch.Generator().manual_seed(10 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


def both(**options: Any) -> tuple[dict[str, nn.Parameter], Any, dict[str, nn.Parameter], Any]:
    ours, theirs = layers(), layers()
    options = {"lr": 0.1} | options
    return ours, ShardedStateOptimizer(ours.items(), Lamb, **options), theirs, Lamb(theirs.items(), **options)


def stepped() -> tuple[dict[str, nn.Parameter], Any]:
    parameters, optimizer, _, _ = both()
    give(parameters.values())
    optimizer.step()
    return parameters, optimizer


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# ---- state dicts


def test_a_state_dict_has_the_options_and_groups_of_this_moment():
    """It was kept from an earlier look: a scheduler's later step was missing in the next checkpoint."""
    _, optimizer = stepped()
    optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 0.01
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.01
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 2)))]})
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3]]
    assert set(saved["state"]) == {0, 1, 2}


def test_a_state_dict_is_the_callers():
    _, optimizer = stepped()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 123.0
    saved["state"][0]["step"] = "changed"
    saved["state"].pop(1)
    again = optimizer.state_dict()
    assert again["param_groups"][0]["lr"] == 0.1
    assert float(again["state"][0]["step"]) == 1
    assert 1 in again["state"]


def test_state_dict_hooks_are_called_and_may_replace_the_dict():
    _, optimizer = stepped()
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(seen.append)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mine": 1})
    assert optimizer.state_dict()["mine"] == 1
    assert seen == [optimizer]


def test_load_hooks_see_what_they_see_in_any_optimizer():
    _, source = stepped()
    saved = source.state_dict()
    _, optimizer, _, plain = both()

    def fresh(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        new = copy.deepcopy(state_dict)
        for found in new["state"].values():
            found["exp_avg"].zero_()
        new["param_groups"][0]["lr"] = 0.5
        return new

    seen: dict[Any, Any] = {}
    for each in (optimizer, plain):
        each.register_load_state_dict_pre_hook(fresh)
        each.register_load_state_dict_post_hook(
            lambda one: seen.update({type(one): [sorted(found) for found in one.state.values()]})
        )
        each.load_state_dict(copy.deepcopy(saved))
    assert seen[ShardedStateOptimizer] == [["exp_avg", "exp_avg_sq", "step"]] * 3
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.5
    assert not any(found["exp_avg"].any() for found in optimizer.state_dict()["state"].values())
    assert saved["param_groups"][0]["lr"] == 0.1


def test_torchs_global_step_hooks_count_one_step():
    parameters, optimizer, _, _ = both()
    calls: list[str] = []
    handle = register_optimizer_step_post_hook(lambda one, *_: calls.append(type(one).__name__))
    try:
        give(parameters.values())
        optimizer.step()
    finally:
        handle.remove()
    assert calls == ["ShardedStateOptimizer"]


# ---- copies


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original(way, before):
    parameters, optimizer, _, _ = both(max_grad_norm=1.0)
    for step in range(before):
        give(parameters.values(), step)
        optimizer.step()
    other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert {id(p) for p in parameters_of(other)}.isdisjoint(map(id, parameters.values()))
    for each in (optimizer, other):
        give(parameters_of(each), 5)
        each.step()
    for ours, copied in zip(parameters_of(optimizer), parameters_of(other), strict=True):
        assert torch.equal(ours, copied)
    assert list(other.trust_ratios) == list(optimizer.trust_ratios)


def test_a_model_and_its_optimizer_are_copied_together():
    model = nn.Linear(4, 3)
    optimizer = ShardedStateOptimizer(model.named_parameters(), Lamb)
    twin, other = copy.deepcopy((model, optimizer))
    assert parameters_of(other)[0] is twin.weight


# ---- layers that are replaced, removed, cast, or in a process group that came later


def test_parameters_that_were_replaced_are_the_ones_that_train():
    ours, optimizer, theirs, plain = both()
    for step in range(4):
        for parameters, each in ((ours, optimizer), (theirs, plain)):
            if step == 2:
                new = nn.Parameter(parameters["second"].detach().clone())
                parameters["second"] = each.param_groups[0]["params"][1] = new
            give(parameters.values(), step)
            each.step()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_a_removed_layer_stays_and_the_others_keep_their_state():
    ours, optimizer, theirs, plain = both()
    for step in range(4):
        for parameters, each in ((ours, optimizer), (theirs, plain)):
            if step == 2:
                each.param_groups[0]["params"].pop(0)
                each.param_groups[0]["param_names"].pop(0)
            give(parameters.values(), step)
            each.step()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name


def test_a_process_group_that_came_after_the_state_divides_it(monkeypatch):
    _, optimizer = stepped()
    whole = {index: found["exp_avg"].flatten() for index, found in optimizer.state_dict()["state"].items()}
    monkeypatch.setattr(ShardedStateOptimizer, "_ranks", lambda self: 2)
    monkeypatch.setattr(ShardedStateOptimizer, "_rank", lambda self: 1)
    optimizer._built()
    for index, found in enumerate(optimizer.state.values()):
        width = -(-len(whole[index]) // 2)
        assert torch.equal(found["exp_avg"], whole[index][width:])
    monkeypatch.setattr(ShardedStateOptimizer, "_ranks", lambda self: 3)
    with pytest.raises(ConflictError, match=r"first.*2 ranks"):
        optimizer._built()


# ---- refused


def test_gradients_do_not_flow_through_an_all_gather():
    with pytest.raises(InvalidOptionError, match="differentiable"):
        ShardedStateOptimizer(layers().items(), Lamb, differentiable=True)
    optimizer = ShardedStateOptimizer(layers().items(), Lamb)
    with pytest.raises(InvalidOptionError, match="differentiable"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], "differentiable": True})
    with pytest.raises(InvalidOptionError, match="max_grad_norm"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(2)))], "max_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1


# ---- on two ranks


def everything_on_ranks() -> dict[str, Any]:
    """Worker: largest difference from the unsharded optimizer at every step, and what is refused."""
    ours, optimizer, theirs, plain = both(max_grad_norm=1.0)
    differences = []
    for step in range(9):
        for parameters, each in ((ours, optimizer), (theirs, plain)):
            if step == 4:
                each.zero_grad()  # frozen, and without a gradient
            else:
                give(parameters.values(), step)
            parameters["first"].requires_grad_(step not in (3, 4, 5))  # frozen when its gradient is there already
            if step == 4:
                give([parameters["second"], parameters["third"]], step)
            if step == 7:
                for parameter in parameters.values():  # nobody has a gradient
                    parameter.grad = None
            each.step()
        differences.append(max(float((ours[name] - theirs[name]).detach().abs().max()) for name in ours))
    weights = torch.cat([parameter.detach().flatten() for parameter in ours.values()])
    everyone = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, weights)
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        give(parameters_of(each), 20)
        each.step()
    copied = all(torch.equal(a, b) for a, b in zip(parameters_of(optimizer), parameters_of(twin), strict=True))
    own = ShardedStateOptimizer(layers().items(), Lamb, process_group=dist.new_group())
    refused = ""
    try:
        pickle.dumps(own)
    except ConflictError as error:
        refused = str(error)
    give(parameters_of(own))
    own.step()
    copy.deepcopy(own).consolidate_state_dict()
    return {
        "differences": differences,
        "equal": all(torch.equal(one, weights) for one in everyone),
        "copied": copied,
        "refused": refused,
        "pickled": pickle.dumps(optimizer),
    }


def test_frozen_unfrozen_and_idle_layers_end_as_in_the_unsharded_optimizer_on_all_ranks():
    """A layer frozen between backward and step moved on the rank that holds the slice, and nowhere else."""
    for found in run_ranks(everything_on_ranks, 2, timeout=90):
        assert max(found["differences"]) < 1e-6, found["differences"]
        assert found["equal"]
        assert found["copied"]
        assert "process group means nothing" in found["refused"]
        with pytest.raises(StateDictError, match=r"of 2; here is rank 0 of 1.*state_dict"):
            pickle.loads(found["pickled"])


def state_by_name_on_ranks() -> dict[str, bool]:
    """Worker: every rank has its own order; the state of rank 0 is loaded on all, and training goes on."""
    own, alone = layers(), layers()
    order = list(own.items())
    reverse = dist.get_rank() == 1
    plain = Lamb(alone.items(), lr=0.1)
    optimizer = ShardedStateOptimizer(order[::-1] if reverse else order, Lamb, lr=0.1)
    for step in range(4):
        if step == 2:
            optimizer.consolidate_state_dict()
            saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(saved)
            optimizer = ShardedStateOptimizer(order[::-1] if reverse else order, Lamb, lr=0.3)
            optimizer.load_state_dict(saved[0])
        for parameters, each in ((own, optimizer), (alone, plain)):
            give(parameters.values(), step)
            each.step()
    return {name: bool(torch.allclose(own[name], alone[name], rtol=1e-5, atol=1e-7)) for name in own}


def test_a_checkpoint_of_rank_0_continues_on_ranks_with_another_order():
    for found in run_ranks(state_by_name_on_ranks, 2, timeout=60):
        assert all(found.values()), found
