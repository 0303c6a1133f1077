"""What a step does with gradients before it uses them: refuse what it cannot handle, and find their global norm."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from lightning_lamb.errors import UnsupportedGradientError
from lightning_lamb.kernels.statistics import statistics
from lightning_lamb.optimizers.plan import LayerPlan, Slot
from lightning_lamb.sharding import aligned_gradient


def check(plan: LayerPlan) -> None:
    """Refuses sparse and complex gradients before anything is updated.

    Raises:
        UnsupportedGradientError: naming the parameter.
    """
    for slot in plan.slots:
        grad = slot.parameter.grad
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"{slot.piece.layer.name}: its gradient is sparse ({grad.layout}), and LAMB's norms and decay need every "
                "element. Build the embedding with sparse=False, or give this parameter to torch.optim.SparseAdam."
            )
        if grad.is_complex():
            refuse_complex(slot.piece.layer.name)


def refuse_complex(name: str) -> None:
    """Raises for a complex parameter or gradient.

    Raises:
        UnsupportedGradientError: always.
    """
    raise UnsupportedGradientError(
        f"{name}: complex numbers have no LAMB update in the paper. Hold the parameter as real and imaginary parts "
        "(torch.view_as_real)."
    )


def local_gradient(slot: Slot) -> Optional[Tensor]:
    """This rank's piece of the layer's gradient as a plain tensor, or None."""
    grad = slot.parameter.grad
    if grad is None:
        return None
    return slot.piece.view(aligned_gradient(slot.parameter, grad, slot.piece.layer.name))


def square_norm(plan: LayerPlan, max_grad_value: Optional[float] = None) -> Optional[Tensor]:
    """The sum of squares of all gradients over all layers and ranks, each element once.

    Communication: one all-reduce of one number per process group that holds pieces of layers.

    Args:
        plan: of the optimizer.
        max_grad_value: bound applied to each element first, as the step does.

    Returns:
        0-dim tensor; None if there is no parameter at all.
    """
    total: Optional[Tensor] = None
    for slots, reduction in plan.global_norms().values():
        grads = [local_gradient(slot) for slot in slots]
        if max_grad_value is not None:
            grads = [None if grad is None else grad.clamp(-max_grad_value, max_grad_value) for grad in grads]
        empty = torch.empty(0, device=slots[0].device)
        part = reduction.total(statistics([empty if grad is None else grad for grad in grads], "l2"))
        total = part if total is None else total + part.to(total.device)
    return total
