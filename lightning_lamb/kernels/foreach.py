"""The multi-tensor kernel: the same equations on lists of tensors, with few temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.equations import NormKind, Scalar
from lightning_lamb.kernels import eager
from lightning_lamb.kernels.batch import Batch


def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    options = batch.options
    grads = _prepared_gradients(batch)
    if options.base == "adam":
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        torch._foreach_mul_(batch.moments2, options.beta2)
        torch._foreach_addcmul_(batch.moments2, grads, grads, value=1 - options.beta2)
        updates = _adam_updates(batch, grads)
    else:
        if options.weight_decay != 0:
            grads = torch._foreach_add(grads, batch.weights, alpha=options.weight_decay)
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        updates = batch.moments1
    batch.updates = list(updates)
    if not options.adapt:
        return eager.no_statistics(batch)
    return statistics(batch.weights, options.norm), statistics(batch.updates, options.norm)


def apply(batch: Batch, step_sizes: list[Scalar]) -> None:
    """See `kernels.batch.Kernel.apply`."""
    assert batch.updates is not None, "direction() comes before apply()"
    first = step_sizes[0]
    if isinstance(first, float) and all(step_size == first for step_size in step_sizes):
        torch._foreach_add_(batch.weights, batch.updates, alpha=-first)
    else:
        for weight, update, step_size in zip(batch.weights, batch.updates, step_sizes):
            if isinstance(step_size, Tensor):
                weight.addcmul_(update, step_size.to(weight.dtype), value=-1)
            else:
                weight.add_(update, alpha=-step_size)
    batch.updates = None


def statistics(tensors: list[Tensor], norm: NormKind) -> Tensor:
    """(n,) `equations.norm_statistic` of each tensor; empty tensors give 0."""
    wide = equations.statistic_dtype(tensors[0].device)
    filled = [tensor for tensor in tensors if tensor.numel()]
    order = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}[norm]
    found = iter(torch._foreach_norm(filled, order, dtype=wide) if filled else [])
    zero = torch.zeros((), dtype=wide, device=tensors[0].device)
    norms = torch.stack([next(found) if tensor.numel() else zero for tensor in tensors])
    return norms.square() if norm == "l2" else norms


def _prepared_gradients(batch: Batch) -> list[Tensor]:
    """`eager.prepared_gradient` of each; the gradients themselves where there is nothing to do."""
    options = batch.options
    grads = [grad.to(weight.dtype) for grad, weight in zip(batch.grads, batch.weights)]
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    if options.max_grad_value is not None:
        grads = list(torch._foreach_clamp_max(grads, options.max_grad_value))
        torch._foreach_clamp_min_(grads, -options.max_grad_value)
    if batch.grad_scale is not None:
        grads = list(torch._foreach_mul(grads, batch.grad_scale.to(batch.weights[0].dtype)))
    return grads


def _adam_updates(batch: Batch, grads: list[Tensor]) -> list[Tensor]:
    at = batch.coefficients
    same = all(coefficients == at[0] for coefficients in at) if not isinstance(at[0].moment1, Tensor) else False
    if not same or at[0].grad != 0 or at[0].grad_square != 0:
        return [
            equations.adam_update(w, g, m, v, a, batch.options.eps, batch.options.weight_decay)
            for w, g, m, v, a in zip(batch.weights, grads, batch.moments1, batch.moments2, at)
        ]
    # (a*m)/(sqrt(c*v) + eps) = m/((sqrt(v)*sqrt(c) + eps)/a): one temporary, reused down to the update itself.
    moment1, moment2 = float(at[0].moment1), float(at[0].moment2)
    updates = list(torch._foreach_sqrt(batch.moments2))
    torch._foreach_mul_(updates, moment2**0.5 / moment1)
    torch._foreach_add_(updates, batch.options.eps / moment1)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, batch.moments1)
    if batch.options.weight_decay != 0:
        torch._foreach_add_(updates, batch.weights, alpha=batch.options.weight_decay)
    return updates
