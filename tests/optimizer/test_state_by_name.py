"""State dicts between optimizers whose parameters have names: state goes by name, never silently by position."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import StateDictError
from lightning_lamb.optimizers import ShardedStateOptimizer
from lightning_lamb.sharding import annotate

OPTIMIZERS = {
    "Lamb": Lamb,
    "Lars": Lars,
    "ShardedStateOptimizer": lambda params, **options: ShardedStateOptimizer(params, Lamb, **options),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def parameters(names: str = "abc") -> dict[str, torch.nn.Parameter]:
    """Of one shape, so that only names tell them apart."""
    return {f"{name}.weight": torch.nn.Parameter(torch.full((3, 3), float(ord(name) % 7 + 1))) for name in names}


def stepped(make: Any, groups: Any, found: dict[str, torch.nn.Parameter]) -> Any:
    """An optimizer with a step behind it, and moments that name their parameter: the gradient is the weight."""
    optimizer = make(groups, lr=0.01)
    for parameter in found.values():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    return optimizer


def moments(optimizer: Any, found: dict[str, torch.nn.Parameter]) -> dict[str, float]:
    """One number of each parameter's first moment, after a state dict, where state is by position."""
    saved = optimizer.state_dict()
    order = {id(p): key for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)
             for key, p in zip(group["params"], own["params"], strict=True)}  # fmt: skip
    return {name: round(float(saved["state"][order[id(p)]]["exp_avg"][0, 0]), 6) for name, p in found.items()}


@every_optimizer
@pytest.mark.parametrize(
    "prefixes", [("", ""), ("", "_orig_mod."), ("_fsdp_wrapped_module.", ""), ("module.", ""), ("", "module.")]
)
def test_layers_that_changed_their_order_keep_their_moments(make, prefixes):
    """Torch loads by position: layers of one shape continued with each other's moments, and with each other's names."""
    before, after = parameters(), parameters()
    first = stepped(make, [(prefixes[0] + name, p) for name, p in before.items()], before)
    names = ["c.weight", "a.weight", "b.weight"]
    second = make([(prefixes[1] + name, after[name]) for name in names], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["param_names"] == [prefixes[1] + name for name in names]
    assert second.param_groups[0]["lr"] == 0.01
    assert moments(second, after) == moments(first, before)
    for parameter in after.values():
        parameter.grad = torch.ones_like(parameter)
    second.step()
    assert set(second.trust_ratios) == {(prefixes[1] if prefixes[1] == "module." else "") + name for name in names}


@every_optimizer
def test_groups_that_changed_places_keep_state_and_options(make):
    before, after = parameters(), parameters()

    def groups(found: dict[str, torch.nn.Parameter], order: list[str]) -> list[dict[str, Any]]:
        decays = {"a": 0.1, "bc": 0.2}
        return [
            {
                "params": [(f"{n}.weight", found[f"{n}.weight"]) for n in members],
                "weight_decay": decays["".join(sorted(members))],
            }
            for members in order
        ]

    first = stepped(make, groups(before, ["a", "bc"]), before)
    second = make(groups(after, ["cb", "a"]), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["weight_decay"] for group in second.param_groups] == [0.2, 0.1]
    assert [group["param_names"] for group in second.param_groups] == [["c.weight", "b.weight"], ["a.weight"]]
    assert moments(second, after) == moments(first, before)


@every_optimizer
def test_other_names_are_refused_and_nothing_is_loaded(make):
    before, after = parameters("abc"), parameters("abd")
    first = stepped(make, before.items(), before)
    second = stepped(make, after.items(), after)
    known = moments(second, after)
    with pytest.raises(StateDictError, match=r"only in the state dict: c\.weight; only here: d\.weight"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert moments(second, after) == known


@every_optimizer
def test_groups_of_other_members_with_options_of_their_own_are_refused(make):
    """Which options would hold for a layer that moved?"""
    before, after = parameters("abcd"), parameters("abcd")
    named, other = list(before.items()), list(after.items())
    first = stepped(
        make, [{"params": named[:2], "weight_decay": 0.1}, {"params": named[2:], "weight_decay": 0.0}], before
    )
    second = make([{"params": other[::2], "weight_decay": 0.1}, {"params": other[1::2], "weight_decay": 0.0}], lr=0.01)
    with pytest.raises(StateDictError, match=r"a\.weight: its parameter group 0 has other members in the state dict"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    alike = make([{"params": other[::2]}, {"params": other[1::2]}], lr=0.01)
    source = make([{"params": named[:2]}, {"params": named[2:]}], lr=0.01)
    for parameter in before.values():
        parameter.grad = parameter.detach().clone()
    source.step()
    alike.load_state_dict(copy.deepcopy(source.state_dict()))
    assert moments(alike, after) == moments(source, before)


@pytest.mark.parametrize("saved_names", [True, False])
def test_without_names_on_one_side_state_goes_by_position(saved_names):
    before, after = parameters(), parameters()
    first = stepped(Lamb, before.items() if saved_names else before.values(), before)
    second = Lamb(after.values() if saved_names else after.items(), lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert moments(second, after) == moments(first, before)
    assert ("param_names" in second.param_groups[0]) is not saved_names  # its own, not the checkpoint's


def test_names_of_an_annotated_module_count_as_known():
    """LargeBatch annotates modules, and optimizers need no names of their own."""
    first_module, second_module = (
        torch.nn.ModuleDict({n: torch.nn.Linear(3, 3, bias=False) for n in order}) for order in ("ab", "ba")
    )
    second_module.load_state_dict(first_module.state_dict())
    for module in (first_module, second_module):
        annotate(module)
    first = stepped(Lamb, first_module.parameters(), dict(first_module.named_parameters()))
    saved = first.state_dict()
    saved["param_groups"][0]["param_names"] = ["a.weight", "b.weight"]
    second = Lamb(second_module.parameters(), lr=0.01)
    second.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(
        second.state[second_module["a"].weight]["exp_avg"], first.state[first_module["a"].weight]["exp_avg"]
    )
    assert "param_names" not in second.param_groups[0]


def test_names_in_the_place_of_numbers_are_the_truth():
    """Lightning checkpoints made beside LargeBatch have names as keys; so do torch's distributed checkpoints."""
    before, after = parameters(), parameters()
    first = stepped(Lamb, before.items(), before)
    saved = copy.deepcopy(first.state_dict())
    names = saved["param_groups"][0]["param_names"]
    saved["state"] = {names[key]: found for key, found in saved["state"].items()}
    saved["param_groups"][0]["params"] = list(names)
    second = Lamb(list(after.items())[::-1], lr=0.01)
    second.load_state_dict(saved)
    assert moments(second, after) == moments(first, before)


def test_late_groups_with_made_up_names_load_by_position():
    before, after = parameters("ab"), parameters("ab")
    optimizers = []
    for found in (before, after):
        (first_name, first), (_, second) = found.items()
        optimizer = Lamb([(first_name, first)], lr=0.01)
        optimizer.add_param_group({"params": [second]})
        optimizers.append(optimizer)
    for parameter in before.values():
        parameter.grad = parameter.detach().clone()
    optimizers[0].step()
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert moments(optimizers[1], after) == moments(optimizers[0], before)


@pytest.mark.parametrize("cls", [Lamb, Lars])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_post_hook_of_the_users_does_to_the_state_stays(cls, dtype):
    """Our restoration of full precision came after the user's hooks, and undid what they had done; and an entry of
    theirs in ``optimizer.state`` was a TypeError."""
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = cls([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    seen = []

    def reset(loaded: torch.optim.Optimizer) -> None:
        seen.append(loaded.state[parameter]["exp_avg"].dtype)
        loaded.state[parameter]["exp_avg"].zero_()
        loaded.state["loaded"] = True  # type: ignore[index]

    optimizer.register_load_state_dict_post_hook(reset)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert seen == [torch.float32]
    assert optimizer.state["loaded"] is True
    assert not bool(optimizer.state[parameter]["exp_avg"].any())
    optimizer.step()
    assert float(optimizer.state[parameter]["step"]) == 2
    again = cls([parameter])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state["loaded"] is True
