"""torch.amp.GradScaler around Lamb and Lars: same steps, and a step with an overflow is no step at all."""

from __future__ import annotations

import pytest
import torch
from problems import assert_identical, snapshot
from torch import nn

from lightning_lamb import Lamb, Lars, StagedWarmup

FORMS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])
OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [Lamb, Lars])


def loss_of(weight: nn.Parameter, step: int) -> torch.Tensor:
    return ((weight - 1.0) ** 2 * (1.0 + step)).sum()


@FORMS
@OPTIMIZERS
@pytest.mark.parametrize("clip", [None, 0.5])
def test_scaled_training_equals_unscaled_training_bitwise(optimizer_class, clip, foreach):
    # the scale is a power of two, so scaling and unscaling lose nothing
    plain, scaled = (nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 4.0]])) for _ in range(2))
    control = optimizer_class([plain], lr=0.1, foreach=foreach, max_grad_norm=clip)
    optimizer = optimizer_class([scaled], lr=0.1, foreach=foreach, max_grad_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(8):
        control.zero_grad()
        loss_of(plain, step).backward()
        control.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_identical(scaled.detach(), plain.detach())


@FORMS
@OPTIMIZERS
def test_step_with_an_overflow_is_skipped_and_not_counted(optimizer_class, foreach):
    weight = nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 4.0]]))
    optimizer = optimizer_class([weight], lr=0.1, foreach=foreach, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(weight, step)).backward()
        if step == 2:
            weight.grad[0, 0] = float("inf")
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_identical(snapshot(optimizer), before)
            assert scaler.get_scale() == 2.0
    assert optimizer.state[weight]["step"].item() == 3
    assert weight.isfinite().all()


@OPTIMIZERS
def test_unscaling_first_for_an_outside_clip_gives_the_same_step(optimizer_class):
    weights = [nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 4.0]])) for _ in range(2)]
    optimizers = [optimizer_class([weight], lr=0.1) for weight in weights]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in weights]
    for weight, optimizer, scaler, early in zip(weights, optimizers, scalers, (False, True), strict=True):
        scaler.scale(loss_of(weight, 0)).backward()
        if early:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert_identical(weights[1].detach(), weights[0].detach())


@OPTIMIZERS
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("max_grad_value", [None, 1.0])
def test_a_skipped_step_is_counted_by_nobody(optimizer_class, fused, max_grad_value):
    """With ``fused=True`` the scaler calls ``step()`` also where it found an overflow; the schedule counted that."""
    weight = nn.Parameter(torch.tensor([[3.0, -2.0], [0.5, 4.0]]))
    optimizer = optimizer_class([weight], lr=0.1, fused=fused, max_grad_value=max_grad_value)
    schedule = StagedWarmup(optimizer, total_steps=100, warmup_steps=10)
    schedule.follow_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    skipped = []
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(weight, step)).backward()
        if step in (1, 2, 4):
            weight.grad[0, 0] = float("inf") if step != 2 else float("nan")
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        skipped.append(optimizer.step_was_skipped)
    assert float(optimizer.state[weight]["step"]) == schedule.last_epoch == 3
    # not fused, the scaler leaves step() out, and the last one was a step
    assert skipped == [False, bool(fused), bool(fused), False, bool(fused), False]
    assert bool(weight.isfinite().all())
