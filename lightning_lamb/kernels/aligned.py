"""What a kernel that reads memory directly must know before it does: where, how much, and in which order."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, eq, is_
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lamb.kernels.batch import Batch

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
GRADS = 1
PLAIN = {Tensor, torch.nn.Parameter}

_dtype_of = attrgetter("dtype")


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
    """The batch's tensors, or copies of those that are not dense, not laid out alike, or gradients of unlike dtypes.

    Args:
        batch: its memory is used.
        is_readable: whether the kernel converts gradients of this dtype itself.

    Raises:
        ValueError: a gradient or state without the shape of its weight.
    """
    lists = batch.weights, batch.grads, batch.moments1, batch.moments2, batch.parameters
    grads = batch.grads
    one_kind = len(set(map(_dtype_of, grads))) == 1 and is_readable(grads[0])
    is_plain = one_kind and set(map(type, grads)) <= PLAIN and all(map(Tensor.is_contiguous, grads))
    pointers = list(map(pointers_to, lists)) if is_plain else []
    known = batch.memory.get("known")
    if is_plain and known is not None and known.holds(lists, pointers):
        _check_sizes(lists, GRADS, known.sizes)
        return Aligned(lists, [], known.sizes, pointers)
    sizes = array("q", map(Tensor.numel, batch.weights))
    _check_sizes(lists, GRADS, sizes)
    if not is_plain:
        return _copied(lists, sizes, convert=not one_kind)
    if not all(all(map(Tensor.is_contiguous, part)) for part in lists):
        return _copied(lists, sizes, convert=False)
    _check_state(lists, sizes)
    kept = [part if index != GRADS else [] for index, part in enumerate(lists)]
    batch.memory["known"] = _Known(kept, pointers, sizes)
    return Aligned(lists, [], sizes, pointers)


def plain(tensors: Iterable[Tensor], device_type: str, dtypes: Container[torch.dtype]) -> bool:
    """Whether these are ordinary tensors, whose address says all, on such a device and of one of these dtypes."""
    return all(type(one) in PLAIN and one.device.type == device_type and one.dtype in dtypes for one in tensors)


def pointers_to(tensors: Sequence[Tensor]) -> array[int]:
    """Their addresses."""
    return array("Q", map(Tensor.data_ptr, tensors))


@dataclass
class _Known:
    """Tensors that were found contiguous and of the right sizes, and where they lay.

    Looking at four tensors per layer again at every step would take as long as stepping a small layer.
    """

    lists: list[list[Tensor]]
    pointers: list[array[int]]
    sizes: array[int]

    def holds(self, lists: Lists, pointers: list[array[int]]) -> bool:
        """Whether all but the gradients are the same tensors, at the same addresses."""
        return all(
            index == GRADS or (pointers[index] == self.pointers[index] and all(map(is_, part, self.lists[index])))
            for index, part in enumerate(lists)
        )


def _copied(lists: Lists, sizes: array[int], convert: bool) -> Aligned:
    """`aligned` where some tensors must be copied for the call; ``convert``: gradients to the dtype of the weights."""
    _check_state(lists, sizes)
    copied: list[tuple[Tensor, Tensor]] = []
    result: Lists = ([], [], [], [], [])
    for index, weight in enumerate(lists[0]):
        pattern = weight if torch.ops.aten.is_non_overlapping_and_dense(weight) else torch.empty_like(weight)
        for kind, (part, target) in enumerate(zip(lists, result)):
            if not part:
                continue
            own = part[index]
            dtype = weight.dtype if kind == GRADS and convert else own.dtype
            if own.stride() == pattern.stride() and own.dtype == dtype and type(own) in PLAIN:
                target.append(own)
                continue
            copy = torch.empty_like(pattern, dtype=dtype).copy_(own)
            target.append(copy)
            if kind != GRADS:
                copied.append((own, copy))
    return Aligned(result, copied, sizes, list(map(pointers_to, result)))


def _check_state(lists: Lists, sizes: array[int]) -> None:
    for index in (2, 3, 4):
        _check_sizes(lists, index, sizes)
    for part in lists[2:4]:
        if len(set(map(_dtype_of, part))) > 1:
            raise ValueError(f"state of one batch in several dtypes: {sorted(map(str, set(map(_dtype_of, part))))}")


def _check_sizes(lists: Lists, index: int, sizes: array[int]) -> None:
    """Kernels trust their sizes; a gradient or a state that somebody replaced might not fit."""
    part = lists[index]
    if part and not all(map(eq, map(Tensor.numel, part), sizes)):
        wrong = next(at for at, (one, size) in enumerate(zip(part, sizes)) if one.numel() != size)
        raise ValueError(
            f"a weight of shape {tuple(lists[0][wrong].shape)} meets a gradient or state of shape "
            f"{tuple(part[wrong].shape)}: gradients and state must have the parameter's shape"
        )
