"""Whether tensors still are what they were: type, dtype, device, shape, strides and torch's lazy bits, in one call.

A kernel that reads memory must know these at every step, because ``model.double()``, ``tensor.data = ...`` and
``share_memory_()`` change them without making another tensor. To ask each tensor for each of them would take as long
as to step a small layer; torch's compiler has the same question, and an answer in C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_facts = attrgetter("dtype", "device", "shape", "requires_grad")


class Unchanged:
    """Remembers what some tensors are; it keeps none of them alive, and knows nothing of addresses and values.

    Args:
        tensors: as they are now.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._guards = _guards(tensors)
        self._facts = None if self._guards is not None else _slow_facts(tensors)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are alike, one by one. A False may be over-cautious; a True is certain."""
        if len(tensors) != self._count:
            return False
        if self._guards is None:
            return _slow_facts(tensors) == self._facts
        return bool(self._guards.check(*tensors))


def _guards(tensors: Sequence[Tensor]) -> Any | None:
    """Torch's own check of many tensors; None in a version without it."""
    kind = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)
    if kind is None:
        return None
    try:
        return kind(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    except TypeError:  # another version's arguments
        return None


def _slow_facts(tensors: Sequence[Tensor]) -> list[Any]:
    return [(type(one), _facts(one), one.stride(), one.is_neg(), one.is_conj()) for one in tensors]
