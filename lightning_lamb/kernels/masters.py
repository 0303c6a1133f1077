"""Half-precision parameters and their float32 masters: what is read before a step and written after it.

For kernels that do not fold it into their passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lamb.kernels.batch import Batch
from lightning_lamb.kernels.lazy_bits import write


def take_over(batch: Batch) -> None:
    """Puts into the masters what somebody else changed in the parameters; keeps the masters' digits where nobody did.

    Loading new weights into the module would otherwise be undone by the next step. In place, no host sync.
    """
    for master, parameter in zip(batch.weights, batch.parameters):
        refresh(master, parameter)


def refresh(master: Tensor, parameter: Tensor) -> None:
    """`take_over` of one parameter."""
    kept = master.to(parameter.dtype) == parameter
    write(master, torch.where(kept, master, parameter.to(master.dtype)))


def hand_out(batch: Batch) -> None:
    """Rounds the masters to the parameters."""
    if not any(map(Tensor.is_neg, batch.parameters)):
        if batch.parameters:
            torch._foreach_copy_(batch.parameters, batch.weights)
        return
    for parameter, master in zip(batch.parameters, batch.weights):
        write(parameter, master)
