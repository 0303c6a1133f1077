"""Torch's lazy negation bit (`Tensor.is_neg`) on tensors that a kernel of torch operations changes in place.

Single operations obey it; the multi-tensor ones refuse to write to such tensors.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from lightning_lamb.kernels.batch import Batch

CHANGED = ("weights", "moments1", "moments2", "parameters")

Replaced = list[tuple[str, int, Tensor]]


def write(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)``, which torch's fake CUDA tensors do not know on a machine without a GPU."""
    if target.is_neg() or torch.is_grad_enabled():  # the multi-tensor form has no derivative
        target.copy_(value)
    else:
        torch._foreach_copy_([target], [value])


def materialize(batch: Batch) -> Replaced:
    """Puts ordinary tensors where the batch has negated ones that a kernel changes; almost always there are none.

    Returns:
        For `give_back`: list, position, and the tensor that was there.
    """
    if torch.compiler.is_compiling():
        return []
    if not any(map(Tensor.is_neg, chain.from_iterable(getattr(batch, name) for name in CHANGED))):
        return []
    replaced = []
    for name in CHANGED:
        tensors = list(getattr(batch, name))
        for index, tensor in enumerate(tensors):
            if tensor.is_neg():
                replaced.append((name, index, tensor))
                tensors[index] = tensor.resolve_neg()
        setattr(batch, name, tensors)
    return replaced


def give_back(batch: Batch, replaced: Replaced) -> None:
    """Writes what became of the replacements to the tensors that were there, and puts these back."""
    for name, index, tensor in replaced:
        tensor.copy_(getattr(batch, name)[index])
        getattr(batch, name)[index] = tensor
