"""The reference is judged first: by formulas written from other people's sources, and by steps worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peers_reference import ApexFusedLamb, DeepSpeedFusedLamb, TFAddonsLamb, TimmLamb
from problems import STEPS, layer_gradients, layer_weights
from reference import ReferenceLamb, ReferenceLars, layer_norm
from tolerances import assert_close

LAYERS_WITH_EVERY_GRADIENT = [name for name in layer_weights() if name != "sometimes"]  # step counts differ by peer


@pytest.mark.parametrize(
    ("peer", "peer_options", "reference_options"),
    [
        (TFAddonsLamb, {"learning_rate": 0.01, "weight_decay": 0.02}, {"weight_decay": 0.02}),
        (ApexFusedLamb, {"lr": 0.01, "max_grad_norm": 1e9, "use_nvlamb": True}, {}),
        (ApexFusedLamb, {"lr": 0.01}, {"max_grad_norm": 1.0, "adapt": "decayed"}),
        (DeepSpeedFusedLamb, {"lr": 0.01}, {"eps": 1e-8, "weight_decay": 0.0, "bias_correction": "lr",
                                           "trust_ratio_bounds": (0.01, 10.0)}),
        (TimmLamb, {"lr": 0.01, "max_grad_norm": None, "always_adapt": True}, {}),
        (TimmLamb, {"lr": 0.01, "trust_clip": True}, {"max_grad_norm": 1.0, "trust_ratio_bounds": (0.0, 1.0)}),
    ],
)  # fmt: skip
def test_reference_equals_five_formulas_written_from_other_sources(peer, peer_options, reference_options):
    weights = {name: weight for name, weight in layer_weights().items() if name in LAYERS_WITH_EVERY_GRADIENT}
    reference = ReferenceLamb(weights, lr=0.01, exempt_1d=False, **reference_options)
    other = peer(weights, **peer_options)
    for grads in layer_gradients(STEPS, torch.float64):
        arrays = {name: grads[name].numpy() for name in weights}
        reference.step(arrays)
        other.step(arrays)
    assert_close(reference.weights, other.weights, "float64")


def test_one_lamb_step_worked_out_by_hand():
    # g = 2 everywhere: m = 0.2, v = 0.004, m_hat = 2, v_hat = 4, m_hat / sqrt(v_hat) = 1; w = (3, 4), wd = 0.5:
    # u = (1 + 1.5, 1 + 2) = (2.5, 3); ratio = 5 / sqrt(15.25); w - 0.1 * ratio * u
    reference = ReferenceLamb({"w": np.array([[3.0, 4.0]])}, lr=0.1, eps=0.0, weight_decay=0.5)
    reference.step({"w": np.array([[2.0, 2.0]])})
    ratio = 5 / np.sqrt(15.25)
    assert_close(reference.trust_ratios, {"w": ratio}, "float64")
    assert_close(reference.weights["w"], [[3 - 0.25 * ratio, 4 - 0.3 * ratio]], "float64")


def test_one_lars_step_worked_out_by_hand():
    # m = 0.1 * (g + 0.5 * w) = 0.1 * (1.5 + 1.5, 2 + 2) = (0.3, 0.4); ratio = 5 / 0.5
    reference = ReferenceLars({"w": np.array([[3.0, 4.0]])}, lr=0.1, weight_decay=0.5)
    reference.step({"w": np.array([[1.5, 2.0]])})
    assert_close(reference.trust_ratios, {"w": 10.0}, "float64")
    assert_close(reference.weights["w"], [[3 - 0.3, 4 - 0.4]], "float64")


@pytest.mark.parametrize(("norm", "expected"), [("l1", 7.0), ("l2", 5.0), ("linf", 4.0)])
def test_norms_of_a_three_four_triangle(norm, expected):
    assert layer_norm(np.array([[3.0, 0.0], [0.0, -4.0]]), norm) == expected
    assert layer_norm(np.zeros((0, 3)), norm) == 0.0


def test_nesterov_first_step_worked_out_by_hand():
    # t = 1, g = 1: m = 0.1, v = 0.001. Algorithm 3: m_hat = 0.9*0.1/0.19 + 0.1/0.1, v_hat = 0.999*0.001/0.001.
    # Algorithm 4: v_hat = 0.999*0.001/(1-0.999^2) + 0.001/0.001.
    for nesterov, v_hat in (("first", 0.999), ("both", 0.999 * 0.001 / (1 - 0.999**2) + 1.0)):
        reference = ReferenceLamb(
            {"w": np.ones((1, 1))}, 1.0, eps=0.0, weight_decay=0.0, nesterov=nesterov, adapt=False
        )
        reference.step({"w": np.ones((1, 1))})
        assert_close(reference.weights["w"], [[1 - (0.09 / 0.19 + 1.0) / np.sqrt(v_hat)]], "float64")


def test_reference_refuses_options_it_does_not_know():
    with pytest.raises(KeyError):
        ReferenceLamb({"w": np.ones((1, 1))}, per_layer={"w": {"wieght_decay": 0.0}})
