"""The multi-tensor kernel: the same equations on lists of tensors, with few temporaries.

On a CPU, torch's multi-tensor functions visit a list once per operation, so a large layer would travel from memory a
dozen times. There, a large layer is cut into tiles that stay in the cache for all operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.equations import Bounds, Coefficients, Scalar
from lightning_lamb.kernels import eager, lazy_bits, masters
from lightning_lamb.kernels.batch import Batch, Norms, StepSizes
from lightning_lamb.kernels.statistics import combined, flattened, statistics
from lightning_lamb.kernels.trust_ratios import step_in_two_calls

TILE = 1 << 20
"""Elements of a tile. Smaller ones would stay in nearer caches, and lose more to the calls: after every pass over
megabytes the interpreter's own data must come from memory again."""

FEW = 1 << 14
"""Elements of a layer that costs more to call for than to compute: such layers share their calls."""

ROW = 1 << 8
"""Elements whose squares torch may add up one after another in float32: norms are then right to 3e-7."""

TINY_DECAY = 1e-9
"""Up to here an update over the decay might overflow."""


def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`. For moments in full precision."""
    replaced = lazy_bits.materialize(batch)
    found = _direction_of_all(batch)
    lazy_bits.give_back(batch, replaced)
    return found


def _direction_of_all(batch: Batch) -> tuple[Tensor, Tensor]:
    masters.take_over(batch)
    if not _has_large(batch):
        return _direction(batch)
    parts = _parts(batch)
    updates: dict[int, Tensor] = {}
    factors: dict[int, float] = {}
    found = []
    for indices in parts:
        part = _some(batch, indices)
        found.append(_direction_of_part(part))
        updates |= zip(indices, part.updates or [])
        factors |= zip(indices, part.factors or [_common_factor(part)] * len(indices))
    count = range(len(batch.weights))
    batch.updates, batch.factors = [updates[index] for index in count], [factors[index] for index in count]
    return _in_order(parts, [values[0] for values in found]), _in_order(parts, [values[1] for values in found])


def _has_large(batch: Batch) -> bool:
    """Whether a layer of it is better done alone."""
    return batch.weights[0].device.type == "cpu" and max(map(Tensor.numel, batch.weights)) > FEW


def _parts(batch: Batch) -> list[list[int]]:
    """Indices of the layers that share their calls, and of the others one by one."""
    few = [index for index, weight in enumerate(batch.weights) if weight.numel() <= FEW]
    alone = [[index] for index, weight in enumerate(batch.weights) if weight.numel() > FEW]
    return [few, *alone] if few else alone


def _in_order(parts: list[list[int]], values: list[Tensor]) -> Tensor:
    """(layers,) values in the order of the layers, from those of the parts."""
    if len(values) == 1:
        return values[0]
    joined = torch.cat(values)
    order = [index for indices in parts for index in indices]
    return joined[torch.tensor(order, device=joined.device).argsort()]


def _direction_of_part(part: Batch) -> tuple[Tensor, Tensor]:
    """`direction` of a layer alone, in tiles if it is large, or of several small ones."""
    flats = _default_flats(part)
    if flats is not None:
        found = _default_direction(part, flats)
        weights, updates = torch.tensor(found, dtype=torch.float64, device=part.weights[0].device).view(2, 1)
        return weights, updates
    flats = _flats(part) if part.weights[0].numel() > TILE else None
    return _direction(part) if flats is None else _tiled_direction(part, _tiles(part, flats))


def apply(batch: Batch, step_sizes: StepSizes) -> None:
    """See `kernels.batch.Kernel.apply`."""
    assert batch.updates is not None, "direction() comes before apply()"
    replaced = lazy_bits.materialize(batch)
    sizes = _with_factors(batch, step_sizes)
    if isinstance(sizes, Tensor):
        torch._foreach_addcmul_(batch.weights, batch.updates, list(sizes.to(batch.weights[0]).unbind()), value=-1)
    elif all(size == sizes[0] for size in sizes):
        torch._foreach_add_(batch.weights, batch.updates, alpha=-sizes[0])
    else:
        for weight, update, size in zip(batch.weights, batch.updates, sizes):
            weight.add_(update, alpha=-size)
    batch.updates = None
    masters.hand_out(batch)
    lazy_bits.give_back(batch, replaced)


def step(
    batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
) -> Norms | None:
    """See `kernels.batch.Kernel.step`. A large layer is applied while the cache still holds some of it."""
    bounds = weight_norm_bounds, trust_ratio_bounds
    if not _has_large(batch) or torch.compiler.is_compiling():
        return step_in_two_calls(direction, apply, batch, scales, *bounds)
    replaced = lazy_bits.materialize(batch)
    masters.take_over(batch)
    norms = [[0.0] * len(batch.weights) for _ in Norms._fields]
    for indices in _parts(batch):
        found = _step_of_part(_some(batch, indices), [scales[index] for index in indices], bounds)
        for kind, values in enumerate(found):
            for index, value in zip(indices, values):
                norms[kind][index] = value
    masters.hand_out(batch)
    lazy_bits.give_back(batch, replaced)
    device = batch.weights[0].device
    return Norms(*torch.tensor(norms, dtype=torch.float64, device=device)) if batch.options.adapt else None


def _step_of_part(part: Batch, scales: list[Scalar], bounds: tuple[Bounds, Bounds]) -> list[list[float]]:
    """`step` of a layer alone or of several small ones, masters aside; the `Norms` as numbers, if there are any."""
    flats = _default_flats(part)
    if flats is None or isinstance(scales[0], Tensor):
        norms = step_in_two_calls(_direction_of_part, apply, part, scales, *bounds)
        return [] if norms is None else [values.tolist() for values in norms]
    statistics_found = _default_direction(part, flats)
    if not part.options.adapt:
        apply(part, scales)
        return []
    weight_norm, update_norm = (value**0.5 for value in statistics_found)
    ratio = equations.trust_ratio_of_numbers(weight_norm, update_norm, *bounds)
    apply(part, [scales[0] * ratio])
    return [[weight_norm], [update_norm], [ratio]]


def _with_factors(batch: Batch, step_sizes: StepSizes) -> Tensor | Sequence[float]:
    """Step sizes for ``batch.updates`` as they are, without the factors they lack."""
    factors = batch.factors
    if not isinstance(step_sizes, Tensor) and any(isinstance(size, Tensor) for size in step_sizes):
        device = batch.weights[0].device
        step_sizes = torch.stack([torch.as_tensor(size, device=device) for size in step_sizes])
    if factors is None or len(set(factors)) == 1:
        factor = _common_factor(batch) if factors is None else factors[0]
        return step_sizes * factor if isinstance(step_sizes, Tensor) else [float(size) * factor for size in step_sizes]
    if isinstance(step_sizes, Tensor):
        return torch.stack([size * factor for size, factor in zip(step_sizes.unbind(), factors)])
    return [float(size) * factor for size, factor in zip(step_sizes, factors)]


def _direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """`direction` on whole lists; into ``batch.updates`` where that is given."""
    options = batch.options
    grads = _prepared_gradients(batch)
    if options.base == "adam":
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        torch._foreach_mul_(batch.moments2, _scalar(options.beta2, batch))
        torch._foreach_addcmul_(batch.moments2, grads, grads, value=1 - options.beta2)
        batch.updates = _adam_updates(batch, grads)
    else:
        if options.weight_decay != 0:
            grads = list(torch._foreach_add(grads, batch.weights, alpha=options.weight_decay))
        torch._foreach_lerp_(batch.moments1, grads, 1 - options.beta1)
        batch.updates = list(batch.moments1)
    if not options.adapt:
        return eager.no_statistics(batch)
    norm, factor = options.norm, batch.factors[0] if batch.factors else _common_factor(batch)
    return statistics(batch.weights, norm), statistics(batch.updates, norm) * (factor**2 if norm == "l2" else factor)


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


def _is_default(batch: Batch) -> bool:
    """Whether this is the paper's update of gradients that need no preparation."""
    options, weight, grad = batch.options, batch.weights[0], batch.grads[0]
    return (
        options.base == "adam"
        and options.norm == "l2"
        and not options.maximize
        and options.max_grad_value is None
        and batch.grad_scale is None
        and weight.dtype == grad.dtype == torch.float32
        and _plain_and_alike(batch.coefficients)
        and not torch.compiler.is_compiling()
    )


def _default_flats(part: Batch) -> list[Tensor] | None:
    """The `_flats` of one large layer where `_is_default`; None where `_default_direction` is not the way."""
    return _flats(part) if part.weights[0].numel() > FEW and _is_default(part) else None


def _default_direction(batch: Batch, flats: list[Tensor]) -> tuple[float, float]:
    """`direction` of one layer where `_is_default`: `_direction`, without lists and batches of tiles."""
    options, factor = batch.options, _common_factor(batch)
    shift = options.eps / float(batch.coefficients[0].moment2) ** 0.5
    decays = options.weight_decay > TINY_DECAY
    update = torch.empty_like(batch.weights[0])
    target = flattened(update)
    assert target is not None, "empty_like of a dense tensor is dense"
    norms: tuple[list[Tensor], list[Tensor]] = ([], [])
    for weight, grad, moment1, moment2, out in zip(*map(_cut, (*flats, target))):
        moment1.lerp_(grad, 1 - options.beta1)
        moment2.mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
        # The root: torch's own takes twice as long where MKL computes it, and twenty times of zeros.
        torch.pow(moment2, -0.5, out=out).reciprocal_().add_(shift)
        if decays:
            torch.addcdiv(weight, moment1, out, value=factor / options.weight_decay, out=out)
        else:
            torch.div(moment1, out, out=out)
            if options.weight_decay != 0:
                out.add_(weight, alpha=options.weight_decay / factor)
        if options.adapt:
            for tensor, found in zip((weight, out), norms):
                found += _norms_of_rows(tensor)
    batch.updates = [update]
    if decays:
        batch.factors = [options.weight_decay]
        factor = options.weight_decay
    if not options.adapt:
        return 0.0, 0.0
    weights, updates = (_total(found, tensor) for found, tensor in zip(norms, (batch.weights[0], update)))
    return weights, updates * factor**2


def _cut(flat: Tensor) -> Sequence[Tensor]:
    """Its tiles."""
    return flat.split(TILE) if flat.numel() > TILE else [flat]


def _norms_of_rows(flat: Tensor) -> list[Tensor]:
    """Norms of `ROW` elements each, and of what remains."""
    rest = flat.numel() % ROW
    if rest == 0:
        return [torch.linalg.vector_norm(flat.view(-1, ROW), dim=1)]
    whole, end = flat.split([flat.numel() - rest, rest])
    last = [torch.linalg.vector_norm(end.view(1, -1), dim=1)]
    return [*_norms_of_rows(whole), *last] if len(whole) else last


def _total(norms: list[Tensor], tensor: Tensor) -> float:
    """The sum of squares of a tensor out of the norms of its parts, or once more where float32 lost digits."""
    norm = torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.cat(norms), dtype=torch.float64).item()
    return norm**2 if 1e-10 < norm < 1e15 else equations.norm_statistic(tensor, "l2").item()


def _flats(batch: Batch) -> list[Tensor] | None:
    """Weight, gradient and moments of the batch's one layer in memory order; None if that is not the same for all."""
    tensors = [*batch.weights, *batch.grads, *batch.moments1, *batch.moments2]
    if all(map(Tensor.is_contiguous, tensors)):
        return [tensor.view(-1) for tensor in tensors]
    if any(tensor.stride() != tensors[0].stride() for tensor in tensors):
        return None
    flats = [flat for flat in map(flattened, tensors) if flat is not None]
    return flats if len(flats) == len(tensors) else None


def _tiles(batch: Batch, flats: list[Tensor]) -> list[Batch]:
    """A batch per tile of the batch's one layer."""
    cuts = [flat.split(TILE) for flat in flats]
    has_second = bool(batch.moments2)
    return [
        Batch(batch.options, [w], [g], [m], rest[:1] if has_second else [], batch.coefficients, batch.grad_scale)
        for w, g, m, *rest in zip(*cuts)
    ]


def _some(batch: Batch, indices: list[int]) -> Batch:
    """The batch of these entries alone."""
    lists = batch.weights, batch.grads, batch.moments1, batch.moments2
    weights, grads, moments1, moments2 = ([part[index] for index in indices] if part else [] for part in lists)
    coefficients = [batch.coefficients[index] for index in indices]
    return Batch(batch.options, weights, grads, moments1, moments2, coefficients, batch.grad_scale)


def _prepared_gradients(batch: Batch) -> list[Tensor]:
    """`eager.prepared_gradient` of each; the gradients themselves where there is nothing to do."""
    options = batch.options
    dtype = batch.weights[0].dtype
    grads = batch.grads
    if set(map(attrgetter("dtype"), grads)) != {dtype}:
        grads = [grad.to(dtype) for grad in grads]
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
    # u = (a*m)/(sqrt(c*v) + eps) + decay*w is k*(m/(sqrt(v) + eps/sqrt(c)) + decay/k*w) with k = a/sqrt(c). The
    # factor k is left to the norms and the step size, which saves two passes over memory.
    factor = _common_factor(batch)
    if targets is None:
        targets = list(torch._foreach_sqrt(batch.moments2))
    else:
        for target, moment2 in zip(targets, batch.moments2):
            torch.sqrt(moment2, out=target)
    shift = _scalar(eps / float(at[0].moment2) ** 0.5, batch)
    torch._foreach_add_(targets, [shift] * len(targets) if isinstance(shift, Tensor) else shift)
    if weight_decay > TINY_DECAY and batch.updates is None:
        # One call instead of two: u = decay*(w + k/decay*m/(sqrt(v) + ...)), with decay as the factor that is left.
        batch.factors = [weight_decay] * len(targets)
        return list(torch._foreach_addcdiv(batch.weights, batch.moments1, targets, value=factor / weight_decay))
    for target, moment1 in zip(targets, batch.moments1):
        torch.div(moment1, target, out=target)
    if weight_decay != 0:
        torch._foreach_add_(targets, batch.weights, alpha=weight_decay / factor)
    return targets


def _scalar(value: float, batch: Batch) -> Scalar:
    """``value``, on a CPU as a tensor: torch would otherwise make it one again for each tensor of the list."""
    if batch.weights[0].device.type != "cpu" or torch.compiler.is_compiling():
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _common_factor(batch: Batch) -> float:
    """What ``batch.updates`` must be multiplied by to be the updates of the equations."""
    if batch.options.base != "adam" or not _plain_and_alike(batch.coefficients):
        return 1.0
    return float(batch.coefficients[0].moment1) / float(batch.coefficients[0].moment2) ** 0.5


def _plain_and_alike(at: list[Coefficients]) -> bool:
    """Whether all pieces are at the same step, known on the host, of an update without a gradient term."""
    first = at[0]
    if any(isinstance(value, Tensor) for value in first) or first.grad != 0 or first.grad_square != 0:
        return False
    return all(map(is_, at, repeat(first))) or all(coefficients == first for coefficients in at)
