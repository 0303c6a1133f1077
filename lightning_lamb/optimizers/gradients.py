"""What a step does with gradients before it uses them: refuse what it cannot handle, and find their global norm."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from lightning_lamb.errors import ConflictError, UnsupportedGradientError
from lightning_lamb.kernels.statistics import statistics
from lightning_lamb.optimizers.plan import LayerPlan, Slot
from lightning_lamb.sharding import completed_gradients, refuse_plain_gradient

_layout_of, _dtype_of = attrgetter("layout"), attrgetter("dtype")


def check(plan: LayerPlan, grads: Sequence[Tensor | None]) -> None:
    """Refuses gradients that cannot be used, before anything is updated.

    Args:
        plan: of the optimizer.
        grads: of its slots' parameters.

    Raises:
        UnsupportedGradientError: a sparse or complex one, naming the parameter.
        UnknownShardError: a plain one on a DTensor parameter.
    """
    found = [grad for grad in grads if grad is not None]
    layouts, dtypes = set(map(_layout_of, found)), set(map(_dtype_of, found))
    if not plan.dtensors and layouts <= {torch.strided} and not any(dtype.is_complex for dtype in dtypes):
        return
    for slot, grad in zip(plan.slots, grads):
        if grad is not None:
            refuse_unusable(grad, slot.piece.layer.name)
            refuse_plain_gradient(slot.parameter, grad, slot.piece.layer.name)


def refuse_unusable(grad: Tensor, name: str) -> None:
    """Raises for a sparse or complex gradient.

    Raises:
        UnsupportedGradientError: always for those, never for others.
    """
    if grad.layout != torch.strided:
        raise UnsupportedGradientError(
            f"{name}: its gradient is sparse ({grad.layout}), and LAMB's norms and decay need every element. Build the "
            "embedding with sparse=False, or give this parameter to torch.optim.SparseAdam."
        )
    if grad.is_complex():
        refuse_complex(name)


def refuse_complex(name: str) -> None:
    """Raises for a complex parameter or gradient.

    Raises:
        UnsupportedGradientError: always.
    """
    raise UnsupportedGradientError(
        f"{name}: complex numbers have no LAMB update in the paper. Hold the parameter as real and imaginary parts "
        "(torch.view_as_real)."
    )


def refuse_part_of_gradient_norm(max_grad_norm: float | None) -> None:
    """Raises where torch's ZeroRedundancyOptimizer is building an optimizer that clips by norm.

    Its ranks hold different layers, and the optimizer inside is not told: each would clip by the norm of its own.

    Raises:
        ConflictError: always there, never elsewhere.
    """
    if max_grad_norm is None:
        return
    frame = sys._getframe(1)  # noqa: SLF001 - the one way to see who constructs
    for _ in range(8):
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "torch.distributed.optim.zero_redundancy_optimizer":
            raise ConflictError(
                f"max_grad_norm={max_grad_norm} inside torch's ZeroRedundancyOptimizer: each rank would clip by the "
                "norm of the layers that it holds. Use lightning_lamb.optimizers.ShardedStateOptimizer, which clips by "
                "the norm of all."
            )
        frame = frame.f_back  # type: ignore[assignment]


def local_gradient(slot: Slot) -> Tensor | None:
    """This rank's piece of the layer's gradient as a plain tensor, or None."""
    grad = slot.parameter.grad
    if grad is None:
        return None
    if slot.completed and id(slot.parameter) in slot.completed:
        grad = slot.completed[id(slot.parameter)]
    return slot.piece.view(grad)


@contextlib.contextmanager
def completed(plan: LayerPlan) -> Iterator[None]:
    """While it is open, `local_gradient` gives sums where tensor parallelism left gradients as partial sums.

    Communication: none without such gradients, else see `sharding.completed_gradients`. Re-entrant.
    """
    if plan.completed or not plan.dtensors:
        yield
        return
    plan.completed.update(completed_gradients(plan.dtensors))
    try:
        yield
    finally:
        plan.completed.clear()


def square_norm(plan: LayerPlan, max_grad_values: Sequence[float | None]) -> Tensor | None:
    """The sum of squares of all gradients over all layers and ranks, each element once.

    Communication: one all-reduce of one number per process group that holds pieces of layers.

    Args:
        plan: of the optimizer.
        max_grad_values: per parameter group, the bound applied to each element first, as the step does; or None.

    Returns:
        0-dim tensor; None if there is no parameter at all.
    """
    total: Tensor | None = None
    for slots, reduction in plan.global_norms().values():
        empty = torch.empty(0, device=slots[0].device)
        grads = [local_gradient(slot) for slot in slots]
        bounds = [max_grad_values[slot.group] for slot in slots]
        if any(bound is not None for bound in bounds):  # one at a time: each bounded gradient is a copy
            squares = [statistics([_bounded(*each, empty)], "l2") for each in zip(grads, bounds)]
            part = reduction.total(torch.cat(squares))
        else:
            part = reduction.total(statistics([empty if grad is None else grad for grad in grads], "l2"))
        total = part if total is None else total + part.to(total.device)
    return total


def _bounded(grad: Tensor | None, bound: float | None, empty: Tensor) -> Tensor:
    if grad is None:
        return empty
    return grad if bound is None else grad.clamp(-bound, bound)
