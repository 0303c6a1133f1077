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
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.equations import Bounds, Coefficients, Scalar
from lightning_lamb.kernels.batch import Batch, Norms
from lightning_lamb.kernels.cpu_library import library

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_COPY = 4
BASES = {"adam": 0, "momentum": 1}
NORMS = {"l2": 0, "l1": 1, "linf": 2}
FIRST, SECOND = 1, 2
ELEMENTS_PER_THREAD = 1 << 15
"""Fewer are done before another thread has started."""

_dtype_of = attrgetter("dtype")


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
    return all(
        type(one) in (Tensor, torch.nn.Parameter) and one.device.type == "cpu" and one.dtype in TYPES
        for one in parameters
    )


@torch.compiler.disable
def step(
    batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
) -> Norms | None:
    """See `kernels.batch.Kernel.step`."""
    found = torch.zeros(3, len(batch.weights), dtype=torch.float64)
    _run(batch, FIRST | SECOND, found, scales, weight_norm_bounds, trust_ratio_bounds)
    if not batch.options.adapt:
        return None
    norms = found[:2].sqrt() if batch.options.norm == "l2" else found[:2]
    return Norms(norms[0], norms[1], found[2])


@torch.compiler.disable
def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    found = torch.zeros(3, len(batch.weights), dtype=torch.float64)
    _run(batch, FIRST, found)
    return found[0], found[1]


@torch.compiler.disable
def apply(batch: Batch, step_sizes: Tensor | Sequence[Scalar]) -> None:
    """See `kernels.batch.Kernel.apply`. It works the update out again: the moments must be as `direction` left them."""
    _run(batch, SECOND, None, step_sizes)


def advance(steps: Sequence[Tensor]) -> tuple[Sequence[float], bool]:
    """Adds one to float32 step counts on the host.

    Returns:
        The counts, and whether all are equal. A thousand ``float(step)`` would take longer than to step small layers.
    """
    values, pointers = array("d", bytes(8 * len(steps))), _pointers(steps)
    alike = library().lamb_advance(len(steps), _address(pointers), _address(values))
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
    aligned, copied, sizes, pointers = _aligned(batch)
    arrays = [
        sizes,
        *pointers,
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
        *(TYPES[part[0].dtype] for part in aligned[:3]),
        TYPES[batch.parameters[0].dtype] if batch.parameters else NO_COPY,
        min(torch.get_num_threads(), 1 + sum(sizes) // ELEMENTS_PER_THREAD),
    )
    if library().lamb_run(ctypes.addressof(job)) != 0:
        raise MemoryError(f"no memory for the tile sums of {count} layers with {sum(sizes)} elements together")
    for original, copy in copied:
        original.copy_(copy)
    _tell_autograd(batch, passes)


def _table(coefficients: Sequence[Coefficients]) -> array[float]:
    """(layers, 4) coefficients of the update, one after another; ``lr`` is in the scales."""
    first = coefficients[0]
    if all(map(is_, coefficients, repeat(first))):
        return array("d", map(float, first[:4])) * len(coefficients)
    return array("d", [float(number) for at in coefficients for number in at[:4]])


def _numbers(scales: Tensor | Sequence[Scalar]) -> Iterable[float]:
    return scales.tolist() if isinstance(scales, Tensor) else map(float, scales)


def _pointers(tensors: Sequence[Tensor]) -> array[int]:
    return array("Q", map(Tensor.data_ptr, tensors))


def _address(values: Any) -> int:
    return values.buffer_info()[0]


# ------------------------------------------------------------------------------------------- what the library can read

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
Copies = list[tuple[Tensor, Tensor]]
GRADS = 1


def _aligned(batch: Batch) -> tuple[Lists, Copies, array[int], list[array[int]]]:
    """Weights, gradients, moments and half-precision parameters such that one index means the same element in all.

    Returns:
        The lists; pairs (original, copy) of what has to be copied back after the call; sizes; addresses per list.
    """
    lists = batch.weights, batch.grads, batch.moments1, batch.moments2, batch.parameters
    sizes = array("q", map(Tensor.numel, batch.weights))
    grads = batch.grads
    _check_sizes(lists, GRADS, sizes)
    if not all(map(Tensor.is_contiguous, grads)) or len(set(map(_dtype_of, grads))) > 1 or not _is_readable(grads[0]):
        return _copied(lists, sizes)
    pointers = list(map(_pointers, lists))
    known = batch.memory.get("known")
    if known is not None and known.holds(lists, pointers):
        return lists, [], sizes, pointers
    for index in (2, 3, 4):
        _check_sizes(lists, index, sizes)
        assert len(set(map(_dtype_of, lists[index]))) < 2, "a crew has one dtype"
    if not all(all(map(Tensor.is_contiguous, part)) for part in lists):
        return _copied(lists, sizes)
    batch.memory["known"] = Known([part if index != GRADS else [] for index, part in enumerate(lists)], pointers)
    return lists, [], sizes, pointers


@dataclass
class Known:
    """Tensors that were found contiguous and of the right sizes, and where they lay.

    Looking at four tensors per layer again at every step would take as long as stepping a small layer.
    """

    lists: list[list[Tensor]]
    pointers: list[array[int]]

    def holds(self, lists: Lists, pointers: list[array[int]]) -> bool:
        """Whether all but the gradients are the same tensors, at the same addresses."""
        return all(
            index == GRADS or (pointers[index] == self.pointers[index] and all(map(is_, part, self.lists[index])))
            for index, part in enumerate(lists)
        )


def _copied(lists: Lists, sizes: array[int]) -> tuple[Lists, Copies, array[int], list[array[int]]]:
    """`_aligned` where some tensors must be copied for the call: not dense, not laid out alike, of an unknown dtype."""
    copied: Copies = []
    result: Lists = ([], [], [], [], [])
    grad_types = set(map(_dtype_of, lists[GRADS]))
    convert = len(grad_types) > 1 or not _is_readable(lists[GRADS][0])
    for index, weight in enumerate(lists[0]):
        pattern = weight if torch.ops.aten.is_non_overlapping_and_dense(weight) else torch.empty_like(weight)
        for kind, (part, target) in enumerate(zip(lists, result)):
            if not part:
                continue
            own = part[index]
            dtype = weight.dtype if kind == GRADS and convert else own.dtype
            if own.stride() == pattern.stride() and own.dtype == dtype:
                target.append(own)
                continue
            copy = torch.empty_like(pattern, dtype=dtype).copy_(own)
            target.append(copy)
            if kind != GRADS:
                copied.append((own, copy))
    for index in range(1, len(lists)):
        _check_sizes(lists, index, sizes)
    return result, copied, sizes, list(map(_pointers, result))


def _is_readable(grad: Tensor) -> bool:
    """Whether this build of the library converts gradients of that dtype itself."""
    return grad.dtype in TYPES and (grad.dtype != torch.float16 or bool(library().lamb_knows_float16()))


def _check_sizes(lists: Lists, index: int, sizes: array[int]) -> None:
    """The library trusts its sizes; a gradient or a state that somebody replaced might not fit."""
    part = lists[index]
    if part and not all(map(eq, map(Tensor.numel, part), sizes)):
        wrong = next(at for at, (one, size) in enumerate(zip(part, sizes)) if one.numel() != size)
        raise ValueError(
            f"a weight of shape {tuple(lists[0][wrong].shape)} meets a gradient or state of shape "
            f"{tuple(part[wrong].shape)}: gradients and state must have the parameter's shape"
        )


def _tell_autograd(batch: Batch, passes: int) -> None:
    """Counts the change of weights that torch did not see, so that a backward pass through old ones still complains."""
    changed = [*batch.moments1, *batch.moments2] if passes & FIRST else []
    changed += [*batch.weights, *batch.parameters] if passes & SECOND else []
    try:
        torch.autograd.graph.increment_version(changed)
    except RuntimeError:  # inference tensors have no version
        torch.autograd.graph.increment_version([tensor for tensor in changed if not tensor.is_inference()])
