"""Groups from a model: decay and adaptation exempted separately, by name, shape and module type; misses are errors."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from lightning_lamb import GroupRules, Lamb, lamb_param_groups
from lightning_lamb.errors import InvalidOptionError


class Block(nn.Module):
    """Embedding, norm, two linear layers and a learned temperature."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)
        self.output = nn.Linear(4, 5, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))


MATRICES = {"tokens.weight", "inner.weight", "output.weight"}
SMALL = {"norm.weight", "norm.bias", "inner.bias", "temperature"}


def treatment(groups, default_decay=0.01):
    """Parameter name -> (decay, adapted), after checking the groups themselves."""
    found = {}
    for group in groups:
        assert group["exempt_1d"] is False  # the groups say it all; the optimizer's own shape rule must not interfere
        assert group["weight_decay"] in (0.0, default_decay)
        for name, parameter in group["params"]:
            assert isinstance(parameter, nn.Parameter)
            assert name not in found
            found[name] = (group["weight_decay"] != 0, bool(group["adapt"]))
    return found


def exempted(model, **rules):
    """(names without decay, names without adaptation)."""
    by_name = treatment(lamb_param_groups(model, rules=GroupRules(**rules)))
    assert set(by_name) == {name for name, _ in model.named_parameters()}
    without_decay = {name for name, (decayed, _) in by_name.items() if not decayed}
    return without_decay, {name for name, (_, adapted) in by_name.items() if not adapted}


def test_by_default_parameters_of_at_most_one_dimension_get_neither_decay_nor_ratio():
    assert exempted(Block()) == (SMALL, SMALL)
    assert treatment(lamb_param_groups(Block())) == treatment(lamb_param_groups(Block(), rules=GroupRules()))


def test_default_groups_step_as_the_optimizers_own_shape_rule_does():
    models = [Block(), Block()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Lamb(lamb_param_groups(models[0]), lr=0.1), Lamb(models[1].named_parameters(), lr=0.1)]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, 1.0 + index)
            optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert set(optimizers[0].trust_ratios) == set(optimizers[1].trust_ratios) == MATRICES


def test_shape_rules_for_decay_and_adaptation_are_separate():
    assert exempted(Block(), no_decay_1d=False) == (set(), SMALL)
    assert exempted(Block(), no_adapt_1d=False) == (SMALL, set())
    assert exempted(Block(), no_decay_1d=False, no_adapt_1d=False) == (set(), set())


def test_names_are_regular_expressions_searched_anywhere_in_the_name():
    decay, adapt = exempted(Block(), no_decay_names=[r"^tokens\."], no_decay_1d=False, no_adapt_1d=False)
    assert (decay, adapt) == ({"tokens.weight"}, set())
    decay, adapt = exempted(Block(), no_adapt_names=["n+er", "bias$"], no_decay_1d=False, no_adapt_1d=False)
    assert (decay, adapt) == (set(), {"inner.weight", "inner.bias", "norm.bias"})


@pytest.mark.parametrize("by", [nn.Embedding, "Embedding"], ids=["class", "class name"])
def test_module_types_are_given_as_class_or_class_name(by):
    decay, adapt = exempted(Block(), no_decay_types=[by], no_decay_1d=False, no_adapt_1d=False)
    assert (decay, adapt) == ({"tokens.weight"}, set())
    decay, adapt = exempted(Block(), no_adapt_types=[by, "LayerNorm"], no_decay_1d=False, no_adapt_1d=False)
    assert (decay, adapt) == (set(), {"tokens.weight", "norm.weight", "norm.bias"})


def test_rules_add_up():
    decay, adapt = exempted(Block(), no_decay_names=["output"], no_adapt_types=[nn.Embedding])
    assert decay == SMALL | {"output.weight"}
    assert adapt == SMALL | {"tokens.weight"}


def test_weight_decay_of_the_decayed_groups_is_the_one_given():
    groups = lamb_param_groups(Block(), weight_decay=0.3)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
    optimizer = Lamb(groups, weight_decay=0.7)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}


@pytest.mark.parametrize("rule", ["no_decay_names", "no_adapt_names", "no_decay_types", "no_adapt_types"])
def test_pattern_or_type_that_matches_nothing_is_an_error_naming_it(rule):
    value = "LayrNorm" if rule.endswith("types") else "layer_norm"
    with pytest.raises(InvalidOptionError, match=f"{rule}.*{value}"):
        lamb_param_groups(Block(), rules=GroupRules(**{rule: ["inner" if rule.endswith("names") else "Linear", value]}))


def test_broken_regular_expression_is_an_error_naming_it():
    for option in ("no_decay_names", "no_adapt_names"):
        with pytest.raises(InvalidOptionError, match=option + ".*" + re.escape("bias(")):
            GroupRules(**{option: ["bias("]})


def test_parameters_without_names_are_refused_with_what_to_pass():
    with pytest.raises(InvalidOptionError, match="named_parameters"):
        lamb_param_groups(Block().parameters())


def test_named_parameters_are_accepted_in_place_of_a_module_but_not_types():
    model = Block()
    assert treatment(lamb_param_groups(model.named_parameters())) == treatment(lamb_param_groups(model))
    assert treatment(lamb_param_groups(list(model.named_parameters()))) == treatment(lamb_param_groups(model))
    with pytest.raises(InvalidOptionError, match="no_decay_types"):
        lamb_param_groups(model.named_parameters(), rules=GroupRules(no_decay_types=["Linear"]))


def test_tied_weights_appear_once_and_frozen_parameters_do_not_break_the_groups():
    model = Block()
    model.output.weight = nn.Parameter(torch.ones(5, 4))
    model.tokens.weight = model.output.weight
    model.inner.requires_grad_(False)
    groups = lamb_param_groups(model)
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert all(parameter.requires_grad for parameter in parameters)
    optimizer = Lamb(groups)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.trust_ratios) == 1


def test_groups_are_few_and_none_is_empty():
    groups = lamb_param_groups(Block(), rules=GroupRules(no_decay_names=["output"], no_adapt_types=[nn.Embedding]))
    assert len(groups) == 4
    assert all(group["params"] for group in groups)
    assert len(lamb_param_groups(nn.Linear(3, 3, bias=False))) == 1
