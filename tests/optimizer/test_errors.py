"""Bad options are refused when the optimizer is built, with option, value and remedy in the message."""

from __future__ import annotations

import math

import pytest
import torch
from problems import assert_identical, snapshot
from torch import nn

from lightning_lamb import Lamb, Lars
from lightning_lamb.errors import InvalidOptionError, LightningLambError

NAN, INF = math.nan, math.inf
NUMBERS = {"negative": -0.1, "NaN": NAN, "inf": INF, "text": "0.1", "boolean": True}

LAYERWISE = [
    *[(option, value) for option in ("lr", "weight_decay") for value in (*NUMBERS.values(), None)],
    *[(option, value) for option in ("max_grad_norm", "max_grad_value") for value in (*NUMBERS.values(), 0, 0.0, -1.0)],
    *[
        (option, value)
        for option in ("weight_norm_bounds", "trust_ratio_bounds")
        for value in ((2.0, 1.0), (-1.0, 1.0), (NAN, 1.0), (0.0, NAN), (1.0,), (0.1, 0.2, 0.3), 1.0, "01", ("a", "b"))
    ],
    *[("norm", value) for value in ("l3", 2, None, "L2", "")],
    *[("adapt", value) for value in ("always", None, 2, "True")],
    *[
        (option, value)
        for option in ("exempt_1d", "maximize", "capturable", "differentiable")
        for value in ("no", None)
    ],
    *[(option, value) for option in ("foreach", "fused") for value in ("yes", 3)],
]
LAMB_ONLY = [
    *[("eps", value) for value in (*NUMBERS.values(), None)],
    *[("betas", value) for value in (
        (1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, -0.1), (NAN, 0.9), (0.9, NAN), (INF, 0.9), (0.9,), 0.9, "ab",
        (0.9, 0.99, 0.999), None,
    )],
    *[("nesterov", value) for value in ("second", True, False, 1)],
    *[("bias_correction", value) for value in ("LR", None, "true", 2)],
]  # fmt: skip
LARS_ONLY = [("momentum", value) for value in (*NUMBERS.values(), 1.0, 1.5, None)]
CASES = (
    [(Lamb, *case) for case in LAYERWISE + LAMB_ONLY] + [(Lars, *case) for case in LAYERWISE + LARS_ONLY]
)  # fmt: skip


def parameter():
    return nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("optimizer_class", "option", "value"), CASES, ids=[f"{c.__name__}-{option}={value}" for c, option, value in CASES]
)
def test_bad_value_is_refused_naming_option_and_value(optimizer_class, option, value):
    with pytest.raises(InvalidOptionError) as refusal:
        optimizer_class([parameter()], **{option: value})
    assert option in str(refusal.value)
    shown = repr(value) if not isinstance(value, tuple) else None
    assert shown is None or shown in str(refusal.value) or str(value) in str(refusal.value)
    assert isinstance(refusal.value, ValueError)  # what torch's own optimizers raise
    assert isinstance(refusal.value, LightningLambError)


@pytest.mark.parametrize(
    ("optimizer_class", "option", "value"), CASES, ids=[f"{c.__name__}-{option}={value}" for c, option, value in CASES]
)
def test_bad_value_in_a_group_is_refused_too_and_nothing_is_added(optimizer_class, option, value):
    with pytest.raises(InvalidOptionError, match=option):
        optimizer_class([{"params": [parameter()], option: value}])
    optimizer = optimizer_class([parameter()])
    before = snapshot(optimizer)
    with pytest.raises(InvalidOptionError, match=option):
        optimizer.add_param_group({"params": [parameter()], option: value})
    assert_identical(snapshot(optimizer), before)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_grad_norm": 0.0}, "None"),
        ({"max_grad_value": -1.0}, "None"),
        ({"trust_ratio_bounds": (2.0, 1.0)}, "low"),
        ({"norm": "l3"}, "'l1'"),
        ({"nesterov": "second"}, "'first'"),
        ({"adapt": "always"}, "'decayed'"),
        ({"betas": (0.9, 1.0)}, r"\[0, 1\)"),
        ({"lr": "1e-3"}, "Write 0.001 without quotes"),
    ],
)
def test_message_says_what_to_write_instead(options, said):
    with pytest.raises(InvalidOptionError, match=said):
        Lamb([parameter()], **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nesterov": "first", "bias_correction": "lr"}, "nesterov.*bias_correction"),
        ({"nesterov": "both", "bias_correction": "lr"}, "nesterov.*bias_correction"),
        ({"foreach": True, "differentiable": True}, "differentiable"),
        ({"fused": True, "differentiable": True}, "differentiable"),
        ({"foreach": True, "fused": True}, "foreach.*fused"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said):
    with pytest.raises(InvalidOptionError, match=said):
        Lamb([parameter()], **options)


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
def test_max_grad_norm_must_be_the_same_in_all_groups(optimizer_class):
    groups = [{"params": [parameter()], "max_grad_norm": 1.0}, {"params": [parameter()], "max_grad_norm": 2.0}]
    with pytest.raises(InvalidOptionError, match=r"max_grad_norm.*1\.0.*2\.0|max_grad_norm.*2\.0.*1\.0"):
        optimizer_class(groups)
    optimizer = optimizer_class([parameter()], max_grad_norm=1.0)
    with pytest.raises(InvalidOptionError, match="max_grad_norm"):
        optimizer.add_param_group({"params": [parameter()], "max_grad_norm": None})
    assert len(optimizer.param_groups) == 1
    optimizer_class([{"params": [parameter()], "max_grad_norm": 1.0}, {"params": [parameter()], "max_grad_norm": 1.0}])


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
def test_misspelled_option_is_refused(optimizer_class):
    with pytest.raises(TypeError, match="wieght_decay"):
        optimizer_class([parameter()], wieght_decay=0.1)
    with pytest.raises(TypeError):  # everything after weight_decay is keyword-only
        optimizer_class(
            [parameter()], 1e-3, *([(0.9, 0.999), 1e-6, 0.01] if optimizer_class is Lamb else [0.9, 0.01]), True
        )


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
def test_a_module_in_place_of_its_parameters_is_refused(optimizer_class):
    with pytest.raises(InvalidOptionError, match=r"Linear.*named_parameters"):
        optimizer_class(nn.Linear(2, 2))


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
def test_fused_on_a_parameter_that_has_no_fused_kernel_is_refused_not_ignored(optimizer_class):
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))  # no kernel can ever run here
    weight.grad = torch.ones(2, 2, device="meta")
    with pytest.raises(LightningLambError, match="fused"):
        optimizer_class([weight], fused=True).step()


@pytest.mark.parametrize("value", [torch.tensor([0.1, 0.2]), torch.tensor([])])
def test_learning_rate_tensor_with_several_elements_is_refused(value):
    with pytest.raises(InvalidOptionError, match="lr"):
        Lamb([parameter()], lr=value)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0}, {"lr": 0.0}, {"eps": 0.0}, {"weight_decay": 0}, {"betas": [0.9, 0.999]}, {"betas": (0.0, 0.0)},
        {"trust_ratio_bounds": [0.0, 1.0]}, {"trust_ratio_bounds": (0.01, INF)}, {"weight_norm_bounds": (1, 1)},
        {"max_grad_norm": 1}, {"lr": torch.tensor(0.1)}, {"adapt": "decayed"}, {"bias_correction": "lr"},
    ],
)  # fmt: skip
def test_values_at_the_edge_are_accepted(options):
    weight = parameter()
    weight.grad = torch.ones(2, 2)
    Lamb([weight], **options).step()
    assert weight.isfinite().all()
