"""From statistics to step sizes: what lies between the two calls of a kernel that has no shorter way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_

import torch
from torch import Tensor

from lightning_lamb import equations
from lightning_lamb.equations import Bounds, Scalar
from lightning_lamb.kernels.batch import Batch, Norms, Options, StepSizes


def step_in_two_calls(
    direction: Callable[[Batch], tuple[Tensor, Tensor]],
    apply: Callable[[Batch, StepSizes], None],
    batch: Batch,
    scales: Sequence[Scalar],
    weight_norm_bounds: Bounds,
    trust_ratio_bounds: Bounds,
) -> Norms | None:
    """`kernels.batch.Kernel.step` out of the two calls."""
    statistics = direction(batch)
    sizes, norms = step_sizes(batch.options, *statistics, scales, weight_norm_bounds, trust_ratio_bounds)
    apply(batch, sizes)
    return norms


def step_sizes(
    options: Options,
    weight_statistics: Tensor,
    update_statistics: Tensor,
    scales: Sequence[Scalar],
    weight_norm_bounds: Bounds,
    trust_ratio_bounds: Bounds,
) -> tuple[StepSizes, Norms | None]:
    """Each layer's step size, and the norms and the ratio it came from; no norms where layers are not adapted.

    Args:
        options: of the layers.
        weight_statistics: (pieces,), completed over all ranks.
        update_statistics: (pieces,), likewise.
        scales: per piece, what the ratio is multiplied by: the learning rate, corrected.
        weight_norm_bounds: see `equations.trust_ratio`.
        trust_ratio_bounds: see `equations.trust_ratio`.
    """
    if not options.adapt:
        return scales, None
    weights = equations.norm_of_statistic(weight_statistics, options.norm)
    updates = equations.norm_of_statistic(update_statistics, options.norm)
    ratios = equations.trust_ratio(weights, updates, weight_norm_bounds, trust_ratio_bounds)
    if _all_same(scales):
        sizes = ratios * scales[0]
    else:
        sizes = torch.stack([ratio * scale for ratio, scale in zip(ratios.unbind(), scales)])
    return sizes, Norms(weights, updates, ratios)


def _all_same(scales: Sequence[Scalar]) -> bool:
    first = scales[0]
    return all(map(is_, scales, repeat(first))) or all(
        scale is first or (isinstance(scale, float) and scale == first) for scale in scales
    )
