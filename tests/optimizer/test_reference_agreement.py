"""Every option equals the NumPy float64 reference over 50 steps, layers of every awkward kind included."""

from __future__ import annotations

import pytest
import torch
from option_table import LAMB, LAMB_GROUP_OVERRIDES, LARS
from problems import as_parameters, layer_weights, named, walk_together
from reference import ReferenceLamb, ReferenceLars

from lightning_lamb import Lamb, Lars

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])


@FORMS
@pytest.mark.parametrize("case", LAMB)
def test_lamb_equals_float64_reference_to_1e_12_over_50_steps(case, foreach):
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer = Lamb(named(parameters), lr=1.0, foreach=foreach, **LAMB[case])
    walk_together(optimizer, parameters, ReferenceLamb(weights, lr=1.0, **LAMB[case]), "float64")


@FORMS
@pytest.mark.parametrize("case", LARS)
def test_lars_equals_float64_reference_to_1e_12_over_50_steps(case, foreach):
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer = Lars(named(parameters), lr=1.0, foreach=foreach, **LARS[case])
    walk_together(optimizer, parameters, ReferenceLars(weights, lr=1.0, **LARS[case]), "float64")


@FORMS
@pytest.mark.parametrize("case", LAMB)
def test_lamb_in_float32_equals_reference_to_1e_6(case, foreach):
    weights = {name: value.astype("float32") for name, value in layer_weights().items()}
    parameters = as_parameters(weights, torch.float32)
    optimizer = Lamb(named(parameters), lr=1.0, foreach=foreach, **LAMB[case])
    walk_together(optimizer, parameters, ReferenceLamb(weights, lr=1.0, **LAMB[case]), "float32")


@FORMS
@pytest.mark.parametrize("case", ["defaults", "l1 norm", "clipped by value, then norm"])
def test_lars_in_float32_equals_reference_to_1e_6(case, foreach):
    weights = {name: value.astype("float32") for name, value in layer_weights().items()}
    parameters = as_parameters(weights, torch.float32)
    optimizer = Lars(named(parameters), lr=1.0, foreach=foreach, **LARS[case])
    walk_together(optimizer, parameters, ReferenceLars(weights, lr=1.0, **LARS[case]), "float32")


@FORMS
@pytest.mark.parametrize("case", LAMB_GROUP_OVERRIDES)
@pytest.mark.parametrize("common", [{}, {"max_grad_norm": 0.7}], ids=["unclipped", "clipped over both groups"])
def test_two_groups_with_different_options_equal_reference(case, common, foreach):
    weights, override = layer_weights(), LAMB_GROUP_OVERRIDES[case]
    parameters = as_parameters(weights, torch.float64)
    second = ("wide", "bias", "conv", "sometimes", "silent")
    groups = [
        {"params": [item for item in named(parameters) if item[0] not in second]},
        {"params": [item for item in named(parameters) if item[0] in second], **override},
    ]
    optimizer = Lamb(groups, lr=1.0, foreach=foreach, **common)
    reference = ReferenceLamb(weights, lr=1.0, per_layer=dict.fromkeys(second, override), **common)
    walk_together(optimizer, parameters, reference, "float64", steps=20)


def test_options_of_a_group_are_read_at_every_step():
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    optimizer, reference = Lamb(named(parameters), lr=1.0), ReferenceLamb(weights, lr=1.0)
    changes = {"weight_decay": 0.3, "norm": "l1", "betas": (0.7, 0.9), "trust_ratio_bounds": (0.2, 0.9), "adapt": False}
    for key, value in changes.items():
        optimizer.param_groups[0][key] = value
        for options in reference.options.values():
            options[key] = value
        walk_together(optimizer, parameters, reference, "float64", steps=12)


def test_default_form_equals_reference():
    weights = layer_weights()
    parameters = as_parameters(weights, torch.float64)
    walk_together(Lamb(named(parameters), lr=1.0), parameters, ReferenceLamb(weights, lr=1.0), "float64")


def test_constructor_defaults_are_those_of_the_reference():
    weights = layer_weights()
    for optimizer_class, reference_class in ((Lamb, ReferenceLamb), (Lars, ReferenceLars)):
        options = next(iter(reference_class(weights).options.values()))
        defaults = optimizer_class(as_parameters(weights, torch.float32).values()).defaults
        assert {key: defaults[key] for key in options} == options
