"""What a kernel that reads memory directly must know before it does: where, how much, and in which order."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, eq
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lamb.errors import ConflictError
from lightning_lamb.kernels.batch import Batch
from lightning_lamb.kernels.unchanged import Unchanged

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
GRADS = 1
PLAIN = {Tensor, torch.nn.Parameter}

_dtype_of, _device_of = attrgetter("dtype"), attrgetter("device")


class Aligned(NamedTuple):
    """Tensors of a batch such that one index means the same element in all of a layer's.

    Attributes:
        lists: weights, gradients, first and second moments, half-precision parameters; a list may be empty.
        copied: pairs (original, copy) of what has to be copied back after the call.
        sizes: elements per layer.
        pointers: addresses, per list.
    """

    lists: Lists
    copied: list[tuple[Tensor, Tensor]]
    sizes: array[int]
    pointers: list[array[int]]


def aligned(batch: Batch, is_readable: Callable[[Tensor], bool]) -> Aligned:
    """The batch's tensors, or copies of those that memory alone does not describe as the kernel expects.

    Copied are tensors that are not dense or not laid out alike, that have torch's lazy negation bit, or are of another
    dtype or device than they should be: gradients unlike each other, moments unlike their weights.

    Args:
        batch: its memory is used.
        is_readable: whether the kernel converts gradients of this dtype itself.

    Raises:
        ValueError: a gradient or state without the shape of its weight.
        ConflictError: a tensor whose memory has been freed.
    """
    lists = batch.weights, batch.grads, batch.moments1, batch.moments2, batch.parameters
    tensors = list(chain.from_iterable(lists))
    known = batch.memory.get("known")
    if known is not None and known.unchanged.holds(tensors):
        return Aligned(lists, [], known.sizes, _addresses(lists))
    sizes = array("q", map(Tensor.numel, batch.weights))
    for index in range(1, len(lists)):
        _check_sizes(lists, index, sizes)
    wanted = _wanted_dtypes(batch, is_readable)
    if not _is_readable(lists, wanted):
        result, copied = _copied(lists, wanted)
        return Aligned(result, copied, sizes, _addresses(result))
    batch.memory["known"] = _Known(Unchanged(tensors), sizes)
    return Aligned(lists, [], sizes, _addresses(lists))


def plain(tensors: Iterable[Tensor], device_type: str, dtypes: Container[torch.dtype]) -> bool:
    """Whether these are ordinary tensors, whose address says all, on such a device and of one of these dtypes."""
    return all(type(one) in PLAIN and one.device.type == device_type and one.dtype in dtypes for one in tensors)


def pointers_to(tensors: Sequence[Tensor]) -> array[int]:
    """Their addresses."""
    return array("Q", map(Tensor.data_ptr, tensors))


@dataclass
class _Known:
    """What was found out about the tensors of a batch, good for as long as `Unchanged` says."""

    unchanged: Unchanged
    sizes: array[int]


def _wanted_dtypes(batch: Batch, is_readable: Callable[[Tensor], bool]) -> list[torch.dtype]:
    """The dtype that all tensors of a list must have, per list."""
    weight = batch.weights[0].dtype
    grads = set(map(_dtype_of, batch.grads))
    grad = batch.grads[0].dtype if len(grads) == 1 and is_readable(batch.grads[0]) else weight
    moment = torch.bfloat16 if batch.seeds else weight
    return [weight, grad, moment, moment, batch.parameters[0].dtype if batch.parameters else weight]


def _is_readable(lists: Lists, wanted: Sequence[torch.dtype]) -> bool:
    """Whether address and size say all about these tensors."""
    device = lists[0][0].device
    return all(
        set(map(type, part)) <= PLAIN
        and set(map(_dtype_of, part)) <= {dtype}
        and all(map(Tensor.is_contiguous, part))
        and not any(map(Tensor.is_neg, part))
        and set(map(_device_of, part)) <= {device}
        for part, dtype in zip(lists, wanted)
    )


def _copied(lists: Lists, wanted: Sequence[torch.dtype]) -> tuple[Lists, list[tuple[Tensor, Tensor]]]:
    """`aligned` where some tensors must be copied for the call; and what has to be copied back."""
    copied: list[tuple[Tensor, Tensor]] = []
    result: Lists = ([], [], [], [], [])
    device = lists[0][0].device
    for index, weight in enumerate(lists[0]):
        is_dense = torch.ops.aten.is_non_overlapping_and_dense(weight)
        strides = (weight if is_dense else torch.empty_like(weight)).stride()
        for kind, (part, target) in enumerate(zip(lists, result)):
            if not part:
                continue
            own, dtype = part[index], wanted[kind]
            fits = own.stride() == strides and own.dtype == dtype and own.device == device
            if fits and type(own) in PLAIN and not own.is_neg():
                target.append(own)
                continue
            copy = torch.empty_strided(weight.shape, strides, dtype=dtype, device=device).copy_(own)
            target.append(copy)
            if kind != GRADS:
                copied.append((own, copy))
    return result, copied


def _addresses(lists: Lists) -> list[array[int]]:
    """`pointers_to` each list.

    Raises:
        ConflictError: a tensor with elements and no memory.
    """
    pointers = list(map(pointers_to, lists))
    for part, found in zip(lists, pointers):
        if 0 in found and (freed := [one for one, at in zip(part, found) if at == 0 and one.numel()]):
            raise ConflictError(
                f"a parameter, gradient or optimizer state of shape {tuple(freed[0].shape)} has no memory any more "
                "(somebody resized its storage to 0, as FSDP does between uses): step while it is there."
            )
    return pointers


def _check_sizes(lists: Lists, index: int, sizes: array[int]) -> None:
    """Kernels trust their sizes; a gradient or a state that somebody replaced might not fit."""
    part = lists[index]
    if part and not all(map(eq, map(Tensor.numel, part), sizes)):
        wrong = next(at for at, (one, size) in enumerate(zip(part, sizes)) if one.numel() != size)
        raise ValueError(
            f"a weight of shape {tuple(lists[0][wrong].shape)} meets a gradient or state of shape "
            f"{tuple(part[wrong].shape)}: gradients and state must have the parameter's shape"
        )
