"""The fused CPU kernel: `lamb_cpu.c`, called with arrays of addresses. It moves the bytes the algorithm must move.

`step` makes both passes of whole layers in one call, so that the second pass of a layer finds it in the cache. There
is no temporary of a layer's size, except for layers whose tensors are not dense or not laid out alike: these are
copied for the call, and back. Half-precision parameters and moments are converted on the way.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.equations import Bounds, Coefficients, Scalar
from lightning_lamb.kernels.aligned import aligned, plain, pointers_to
from lightning_lamb.kernels.batch import Batch, Norms
from lightning_lamb.kernels.cpu_library import library
from lightning_lamb.uncompiled import uncompiled

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_COPY = 4
BASES = {"adam": 0, "momentum": 1}
NORMS = {"l2": 0, "l1": 1, "linf": 2}
FIRST, SECOND = 1, 2
ELEMENTS_PER_THREAD = 1 << 15
"""Fewer are done before another thread has started."""


class Job(ctypes.Structure):
    """One call of the library; the comments are beside the struct of the same name in ``lamb_cpu.c``."""

    _fields_ = (
        ("layers", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sizes", "weights", "grads", "moments1", "moments2", "copies")),
        *((name, ctypes.c_void_p) for name in ("coefficients", "seeds", "step_sizes")),
        *((name, ctypes.c_void_p) for name in ("weight_statistics", "update_statistics", "ratios")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_double) for name in ("max_grad_value", "grad_scale")),
        *((name, ctypes.c_double) for name in ("phi_low", "phi_high", "ratio_low", "ratio_high")),
        *((name, ctypes.c_int32) for name in ("base", "norm", "adapt", "passes")),
        *((name, ctypes.c_int32) for name in ("weight_type", "grad_type", "moment_type", "copy_type")),
        ("threads", ctypes.c_int64),
    )


def suits(parameters: Iterable[Tensor]) -> bool:
    """Whether the kernel can work on these: ordinary tensors in the computer's memory, of a dtype it knows."""
    return plain(parameters, "cpu", TYPES)


@uncompiled
def step(
    batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
) -> Norms | None:
    """See `kernels.batch.Kernel.step`."""
    found = torch.zeros(3, len(batch.weights), dtype=torch.float64, device="cpu")
    _run(batch, FIRST | SECOND, found, scales, weight_norm_bounds, trust_ratio_bounds)
    if not batch.options.adapt:
        return None
    norms = found[:2].sqrt() if batch.options.norm == "l2" else found[:2]
    return Norms(norms[0], norms[1], found[2])


@uncompiled
def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    found = torch.zeros(3, len(batch.weights), dtype=torch.float64, device="cpu")
    _run(batch, FIRST, found)
    return found[0], found[1]


@uncompiled
def apply(batch: Batch, step_sizes: Tensor | Sequence[Scalar]) -> None:
    """See `kernels.batch.Kernel.apply`. It works the update out again: the moments must be as `direction` left them."""
    _run(batch, SECOND, None, step_sizes)


class StepCounts:
    """Float32 step counts on the host, each a tensor, counted in one call.

    A thousand ``float(step)`` would take longer than to step small layers. Where they lie is asked at every step, for
    somebody who moves them (``share_memory_()``).

    Args:
        steps: at least one; nobody but this object and torch's in-place operations may change them.
    """

    def __init__(self, steps: Sequence[Tensor]) -> None:
        self.steps = steps

    def advance(self) -> tuple[Sequence[float], bool]:
        """Adds one to each.

        Returns:
            The counts, and whether all are equal.
        """
        pointers = pointers_to(self.steps)
        values = array("d", bytes(8 * len(self.steps)))
        alike = library().lamb_advance(len(self.steps), _address(pointers), _address(values))
        return values, bool(alike)


# ------------------------------------------------------------------------------------------------------- one call


def _run(
    batch: Batch,
    passes: int,
    found: Tensor | None,
    scales: Tensor | Sequence[Scalar] = (),
    weight_norm_bounds: Bounds = None,
    trust_ratio_bounds: Bounds = None,
) -> None:
    options, count = batch.options, len(batch.weights)
    found_at = aligned(batch, _is_readable)
    sizes = found_at.sizes
    arrays = [
        sizes,
        *found_at.pointers,
        _table(batch.coefficients),
        array("I", batch.seeds or bytes(4 * count)),
        array("d", _numbers(scales)),
    ]
    rows = [None] * 3 if found is None else [found[row].data_ptr() for row in range(3)]
    scale = 1.0 if batch.grad_scale is None else float(batch.grad_scale)
    job = Job(
        count,
        *map(_address, arrays),
        *rows,
        *(options.beta1, options.beta2, options.eps, options.weight_decay),
        math.inf if options.max_grad_value is None else options.max_grad_value,
        -scale if options.maximize else scale,
        *(weight_norm_bounds or (0.0, math.inf)),
        *(trust_ratio_bounds or (0.0, math.inf)),
        *(BASES[options.base], NORMS[options.norm], options.adapt, passes),
        *(TYPES[part[0].dtype] for part in found_at.lists[:3]),
        TYPES[batch.parameters[0].dtype] if batch.parameters else NO_COPY,
        min(torch.get_num_threads(), 1 + sum(sizes) // ELEMENTS_PER_THREAD),
    )
    if library().lamb_run(ctypes.addressof(job)) != 0:
        raise MemoryError(f"no memory for the tile sums of {count} layers with {sum(sizes)} elements together")
    for original, copy in found_at.copied:
        original.copy_(copy)
    _tell_autograd(batch, passes)


def _is_readable(grad: Tensor) -> bool:
    """Whether this build of the library converts gradients of that dtype itself."""
    return grad.dtype in TYPES and (grad.dtype != torch.float16 or bool(library().lamb_knows_float16()))


def _table(coefficients: Sequence[Coefficients]) -> array[float]:
    """(layers, 4) coefficients of the update, one after another; ``lr`` is in the scales."""
    first = coefficients[0]
    if all(map(is_, coefficients, repeat(first))):
        return array("d", map(float, first[:4])) * len(coefficients)
    return array("d", [float(number) for at in coefficients for number in at[:4]])


def _numbers(scales: Tensor | Sequence[Scalar]) -> Iterable[float]:
    return scales.tolist() if isinstance(scales, Tensor) else map(float, scales)


def _address(values: Any) -> int:
    return values.buffer_info()[0]


def _tell_autograd(batch: Batch, passes: int) -> None:
    """Counts the change of weights that torch did not see, so that a backward pass through old ones still complains."""
    if not passes & SECOND:  # no graph has ever seen the moments
        return
    changed = [*batch.weights, *batch.parameters]
    try:
        torch.autograd.graph.increment_version(changed)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
