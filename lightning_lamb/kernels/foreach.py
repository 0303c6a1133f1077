"""The multi-tensor kernel: the same equations on lists of tensors, with few temporaries.

On a CPU, torch's multi-tensor functions visit a list once per operation, so a large layer would travel from memory a
dozen times. There, a large layer is cut into tiles that stay in the cache for all operations.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.equations import Coefficients, Scalar
from lightning_lamb.kernels import eager
from lightning_lamb.kernels.batch import Batch
from lightning_lamb.kernels.statistics import combined, flattened, statistics

TILE = 1 << 18
"""Elements of a tile. Five float32 tiles of 1 MiB stay in a shared cache; smaller ones lose more to thread start-up."""


def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    large = [index for index, weight in enumerate(batch.weights) if weight.device.type == "cpu" and weight.numel() > TILE]
    if not large:
        return _direction(batch)
    weight_statistics, update_statistics, updates, factors = [], [], [], []
    for index in range(len(batch.weights)):
        part = _one(batch, index)
        tiles = _tiles(part) if index in large else None
        found = _direction(part) if tiles is None else _tiled_direction(part, tiles)
        weight_statistics.append(found[0])
        update_statistics.append(found[1])
        updates += part.updates or []
        factors.append(_common_factor(part))
    batch.updates, batch.factors = updates, factors
    return torch.cat(weight_statistics), torch.cat(update_statistics)


def apply(batch: Batch, step_sizes: list[Scalar]) -> None:
    """See `kernels.batch.Kernel.apply`."""
    assert batch.updates is not None, "direction() comes before apply()"
    factors = batch.factors or [_common_factor(batch)] * len(step_sizes)
    step_sizes = [size * factor for size, factor in zip(step_sizes, factors)]
    first = step_sizes[0]
    if isinstance(first, Tensor):
        scales = torch.stack([torch.as_tensor(size) for size in step_sizes]).to(batch.weights[0])
        torch._foreach_addcmul_(batch.weights, batch.updates, list(scales.unbind()), value=-1)
    elif all(size == first for size in step_sizes):
        torch._foreach_add_(batch.weights, batch.updates, alpha=-first)
    else:
        for weight, update, size in zip(batch.weights, batch.updates, step_sizes):
            weight.add_(update, alpha=-size)
    batch.updates = None


def _direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """`direction` on whole lists; into ``batch.updates`` where that is given."""
    options = batch.options
    grads = _prepared_gradients(batch)
    if options.base == "adam":
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        torch._foreach_mul_(batch.moments2, options.beta2)
        torch._foreach_addcmul_(batch.moments2, grads, grads, value=1 - options.beta2)
        batch.updates = _adam_updates(batch, grads)
    else:
        if options.weight_decay != 0:
            grads = list(torch._foreach_add(grads, batch.weights, alpha=options.weight_decay))
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        batch.updates = list(batch.moments1)
    if not options.adapt:
        return eager.no_statistics(batch)
    return statistics(batch.weights, options.norm), _update_statistics(batch)


def _tiled_direction(batch: Batch, tiles: list[Batch]) -> tuple[Tensor, Tensor]:
    """`direction` of one large layer, tile by tile."""
    if batch.options.base == "adam":
        update = torch.empty_like(batch.weights[0])
        flat = flattened(update)
        assert flat is not None, "empty_like of a dense tensor is dense"
        for tile, target in zip(tiles, flat.split(TILE)):
            tile.updates = [target]
    else:
        update = batch.moments1[0]
    parts = [_direction(tile) for tile in tiles]
    batch.updates = [update]
    if not batch.options.adapt:
        return eager.no_statistics(batch)
    weights = combined(torch.cat([part[0] for part in parts]), batch.options.norm)
    updates = combined(torch.cat([part[1] for part in parts]), batch.options.norm)
    return weights.reshape(1), updates.reshape(1)


def _tiles(batch: Batch) -> Optional[list[Batch]]:
    """A batch per tile of the batch's one layer; None if its tensors are not dense in the same order."""
    tensors = [*batch.weights, *batch.grads, *batch.moments1, *batch.moments2]
    if any(tensor.stride() != tensors[0].stride() for tensor in tensors):
        return None
    flats = [flattened(tensor) for tensor in tensors]
    cuts = [flat.split(TILE) for flat in flats if flat is not None]
    if len(cuts) < len(tensors):
        return None
    has_second = bool(batch.moments2)
    return [
        Batch(batch.options, [w], [g], [m], rest[:1] if has_second else [], batch.coefficients, batch.grad_scale)
        for w, g, m, *rest in zip(*cuts)
    ]


def _one(batch: Batch, index: int) -> Batch:
    """The batch of its entry ``index`` alone."""
    pick = slice(index, index + 1)
    return Batch(
        batch.options,
        batch.weights[pick],
        batch.grads[pick],
        batch.moments1[pick],
        batch.moments2[pick],
        batch.coefficients[pick],
        batch.grad_scale,
    )


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
    """`equations.adam_update` of each, into ``batch.updates`` where that is given."""
    at, eps, weight_decay = batch.coefficients, batch.options.eps, batch.options.weight_decay
    targets = batch.updates
    if not _plain_and_alike(at):
        updates = [
            equations.adam_update(weight, grad, moment1, moment2, coefficients, eps, weight_decay)
            for weight, grad, moment1, moment2, coefficients in zip(
                batch.weights, grads, batch.moments1, batch.moments2, at
            )
        ]
        if targets is None:
            return updates
        torch._foreach_copy_(targets, updates)
        return targets
    # u = (a*m)/(sqrt(c*v) + eps) + decay*w is k*(m/(sqrt(v) + eps/sqrt(c)) + decay/k*w) with k = a/sqrt(c). The factor k
    # is left to the norms and the step size, which saves two passes over memory.
    factor = _common_factor(batch)
    if targets is None:
        targets = list(torch._foreach_sqrt(batch.moments2))
    else:
        for target, moment2 in zip(targets, batch.moments2):
            torch.sqrt(moment2, out=target)
    torch._foreach_add_(targets, eps / float(at[0].moment2) ** 0.5)
    for target, moment1 in zip(targets, batch.moments1):
        torch.div(moment1, target, out=target)
    if weight_decay != 0:
        torch._foreach_add_(targets, batch.weights, alpha=weight_decay / factor)
    return targets


def _common_factor(batch: Batch) -> float:
    """What ``batch.updates`` must be multiplied by to be the updates of the equations."""
    if batch.options.base != "adam" or not _plain_and_alike(batch.coefficients):
        return 1.0
    return float(batch.coefficients[0].moment1) / float(batch.coefficients[0].moment2) ** 0.5


def _update_statistics(batch: Batch) -> Tensor:
    """Statistics of the updates of the equations."""
    assert batch.updates is not None
    factor = _common_factor(batch)
    found = statistics(batch.updates, batch.options.norm)
    return found * (factor**2 if batch.options.norm == "l2" else factor)


def _plain_and_alike(at: list[Coefficients]) -> bool:
    """Whether all pieces are at the same step, known on the host, of an update without a gradient term."""
    first = at[0]
    if any(isinstance(value, Tensor) for value in first) or first.grad != 0 or first.grad_square != 0:
        return False
    return all(coefficients is first or coefficients == first for coefficients in at)
