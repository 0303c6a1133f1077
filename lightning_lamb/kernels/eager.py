"""The readable kernel: one layer at a time, straight from the equations. The others are tested against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.equations import Bounds, Scalar
from lightning_lamb.kernels import masters, rounding
from lightning_lamb.kernels.batch import Batch, Norms, Options, StepSizes
from lightning_lamb.kernels.lazy_bits import write
from lightning_lamb.kernels.trust_ratios import step_in_two_calls


def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    options = batch.options
    masters.take_over(batch)
    updates, weight_statistics, update_statistics = [], [], []
    for index, weight in enumerate(batch.weights):
        if options.differentiable:
            weight = weight.clone()  # autograd keeps it for the norm, and apply() writes over the original
        grad = prepared_gradient(batch.grads[index], weight, batch.grad_scale, options)
        if options.base == "adam":
            moment1, moment2 = _moments(batch, index, grad, grad * grad)
            at = batch.coefficients[index]
            update = equations.adam_update(weight, grad, moment1, moment2, at, options.eps, options.weight_decay)
        else:
            decayed = equations.decayed_gradient(weight, grad, options.weight_decay)
            update, _ = _moments(batch, index, decayed, None)
        updates.append(update)
        if options.adapt:
            weight_statistics.append(equations.norm_statistic(weight, options.norm))
            update_statistics.append(equations.norm_statistic(update, options.norm))
    batch.updates = updates
    if not options.adapt:
        return no_statistics(batch)
    return torch.stack(weight_statistics), torch.stack(update_statistics)


def apply(batch: Batch, step_sizes: StepSizes) -> None:
    """See `kernels.batch.Kernel.apply`."""
    assert batch.updates is not None, "direction() comes before apply()"
    for weight, update, step_size in zip(batch.weights, batch.updates, step_sizes):
        if isinstance(step_size, Tensor):
            step_size = step_size.to(weight.dtype)
        weight.sub_(step_size * update)
    batch.updates = None
    masters.hand_out(batch)


def step(
    batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
) -> Norms | None:
    """See `kernels.batch.Kernel.step`."""
    return step_in_two_calls(direction, apply, batch, scales, weight_norm_bounds, trust_ratio_bounds)


def prepared_gradient(grad: Tensor, weight: Tensor, scale: Tensor | None, options: Options) -> Tensor:
    """The gradient as the equations want it: in the weight's precision, signed, bounded, clipped. Not in place."""
    grad = grad.to(weight.dtype)
    if options.maximize:
        grad = -grad
    if options.max_grad_value is not None:
        grad = grad.clamp(-options.max_grad_value, options.max_grad_value)
    if scale is not None:
        grad = grad * scale.to(weight.dtype)
    return grad


def _moments(batch: Batch, index: int, value: Tensor, square: Tensor | None) -> tuple[Tensor, Tensor]:
    """Updates the moments of one layer; returns them as they are stored, in the precision of ``value``."""
    options = batch.options
    found = [equations.moment(batch.moments1[index].to(value.dtype), value, options.beta1)]
    stored = [batch.moments1[index]]
    if square is not None:
        found.append(equations.moment(batch.moments2[index].to(value.dtype), square, options.beta2))
        stored.append(batch.moments2[index])
    if batch.seeds:
        bits = rounding.random_bits(stored[0], batch.seeds[index])
        noise = bits & 0xFFFF, bits >> 16
        found = [rounding.store(*pair) for pair in zip(stored, found, noise)]
    else:
        for target, moment in zip(stored, found):
            write(target, moment)
    return found[0], found[-1]


def no_statistics(batch: Batch) -> tuple[Tensor, Tensor]:
    """Zeros in place of the statistics, for pieces without a trust ratio."""
    device = batch.weights[0].device
    zeros = torch.zeros(len(batch.weights), dtype=equations.statistic_dtype(device), device=device)
    return zeros, zeros
