"""What must be true of LAMB for any layer: step size, scale equivariance, and what the Adam correction can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, relative_error, to_numpy
from torch import nn

from lightning_lamb import Lamb, Lars

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
SEEDS = st.integers(0, 2**31)
SHAPES = st.sampled_from([(2, 3), (1, 1), (3, 2, 2), (17, 1), (4, 4)])
FORMS = st.booleans()


def run(optimizer_class, weight, grads, **options):
    """The weights after each step, in float64, as a list of arrays."""
    parameter = nn.Parameter(torch.tensor(weight))
    optimizer = optimizer_class([("w", parameter)], **options)
    history = []
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        history.append(to_numpy(parameter))
    return history


def drawn(shape, seed, steps):
    draw = np.random.default_rng(seed)
    return draw.standard_normal(shape) + 0.1, [draw.standard_normal(shape) for _ in range(steps)]


@pytest.mark.parametrize("optimizer_class", [Lamb, Lars])
@given(SHAPES, SEEDS, st.floats(1e-5, 0.5), st.floats(0.0, 1.0), st.floats(1e-6, 1e6), FORMS)
@SETTINGS
def test_step_has_the_size_lr_times_weight_norm_whatever_gradient_and_decay(
    optimizer_class, shape, seed, lr, weight_decay, gradient_scale, foreach
):
    weight, grads = drawn(shape, seed, 4)
    grads = [gradient_scale * grad for grad in grads]
    options = {"lr": lr, "weight_decay": weight_decay, "foreach": foreach}
    before = weight
    for after in run(optimizer_class, weight, grads, **options):
        assert_close(np.linalg.norm(after - before), lr * np.linalg.norm(before), "identity", "||dw||")
        before = after


@given(SHAPES, SEEDS, st.sampled_from(["l1", "linf"]), st.floats(0.0, 1.0), FORMS)
@SETTINGS
def test_step_size_holds_in_the_norm_that_was_chosen(shape, seed, norm, weight_decay, foreach):
    weight, grads = drawn(shape, seed, 3)
    order = {"l1": 1, "linf": np.inf}[norm]
    before = weight
    for after in run(Lamb, weight, grads, lr=0.1, norm=norm, weight_decay=weight_decay, foreach=foreach):
        size = np.linalg.norm((after - before).ravel(), order)
        assert_close(size, 0.1 * np.linalg.norm(before.ravel(), order), "identity", "||dw||")
        before = after


@given(SHAPES, SEEDS, st.integers(-20, 20), st.integers(-20, 20), FORMS)
@SETTINGS
def test_scaling_weight_and_loss_scales_the_whole_trajectory(shape, seed, weight_power, gradient_power, foreach):
    """Without decay and eps the direction ignores the gradient's scale, and the step is proportional to the weight."""
    weight, grads = drawn(shape, seed, 5)
    options = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-100, "foreach": foreach}
    plain = run(Lamb, weight, grads, **options)
    scaled = run(Lamb, weight * 2.0**weight_power, [grad * 2.0**gradient_power for grad in grads], **options)
    assert_close(scaled[-1] / 2.0**weight_power, plain[-1], "identity")


@given(SHAPES, SEEDS, st.integers(-20, 20))
@SETTINGS
def test_lars_ignores_the_scale_of_the_gradient_without_decay(shape, seed, power):
    weight, grads = drawn(shape, seed, 5)
    plain = run(Lars, weight, grads, lr=0.1, weight_decay=0.0)
    scaled = run(Lars, weight, [grad * 2.0**power for grad in grads], lr=0.1, weight_decay=0.0)
    assert_close(scaled[-1], plain[-1], "identity")


@given(SHAPES, SEEDS, FORMS)
@SETTINGS
def test_adam_correction_cancels_in_the_ratio_without_decay_and_eps(shape, seed, foreach):
    """Appendix E: the correction multiplies the whole layer by one number, which the trust ratio divides out."""
    weight, grads = drawn(shape, seed, 8)
    options = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-100, "foreach": foreach}
    corrected, plain = (run(Lamb, weight, grads, bias_correction=flag, **options) for flag in (True, False))
    assert_close(plain[-1], corrected[-1], "identity")


@given(SEEDS)
@SETTINGS
def test_adam_correction_does_not_cancel_where_there_is_no_ratio_or_where_there_is_decay(seed):
    weight, grads = drawn((4, 4), seed, 1)
    for options in ({"adapt": False, "weight_decay": 0.0}, {"weight_decay": 1.0}):
        corrected, plain = (run(Lamb, weight, grads, bias_correction=flag, lr=0.1, **options) for flag in (True, False))
        assert relative_error(plain[-1], corrected[-1]) > 1e-4
    # without a ratio the first step is sqrt(1-b2)/(1-b1) = 0.316 of the uncorrected one
    options = {"adapt": False, "weight_decay": 0.0, "eps": 1e-100, "lr": 0.1}
    first, uncorrected = (run(Lamb, weight, grads, bias_correction=flag, **options)[0] for flag in (True, False))
    assert_close((first - weight) / (uncorrected - weight), np.full((4, 4), 0.001**0.5 / 0.1), "identity")


@given(SHAPES, SEEDS, FORMS)
@SETTINGS
def test_correction_on_the_learning_rate_is_the_uncorrected_run_with_a_scheduled_rate(shape, seed, foreach):
    weight, grads = drawn(shape, seed, 1)
    on_lr = run(Lamb, weight, grads, lr=0.1, bias_correction="lr", foreach=foreach)[0]
    scheduled = run(Lamb, weight, grads, lr=0.1 * 0.001**0.5 / 0.1, bias_correction=False, foreach=foreach)[0]
    assert_close(on_lr, scheduled, "identity")


@given(SEEDS, st.floats(0.01, 1.0), FORMS)
@SETTINGS
def test_clipping_by_norm_equals_training_on_gradients_clipped_by_hand(seed, limit, foreach):
    weight, grads = drawn((3, 4), seed, 4)
    clipped = [grad / max(1.0, np.linalg.norm(grad) / limit) for grad in grads]
    by_option = run(Lamb, weight, grads, max_grad_norm=limit, eps=0.1, foreach=foreach)
    by_hand = run(Lamb, weight, clipped, eps=0.1, foreach=foreach)
    assert_close(by_option[-1], by_hand[-1], "identity")


@given(SEEDS, st.permutations(range(5)), FORMS)
@SETTINGS
def test_order_of_parameters_does_not_matter(seed, order, foreach):
    draw = np.random.default_rng(seed)
    weights = [draw.standard_normal((2, 2 + index)) for index in range(5)]
    grads = [draw.standard_normal(weight.shape) for weight in weights]

    def after(indices):
        parameters = {index: nn.Parameter(torch.as_tensor(weights[index].copy())) for index in indices}
        optimizer = Lamb([parameters[index] for index in indices], max_grad_norm=0.5, foreach=foreach)
        for index, parameter in parameters.items():
            parameter.grad = torch.as_tensor(grads[index])
        optimizer.step()
        return {index: parameters[index] for index in range(5)}

    assert_close(after(order), after(range(5)), "identity")
