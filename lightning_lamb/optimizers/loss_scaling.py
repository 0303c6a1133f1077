"""A loss scale that is taken out on the way: what `torch.amp.GradScaler` leaves to optimizers with ``fused=True``.

The scaler then does not divide gradients by its scale. It sets two attributes for the duration of ``step()``:
``grad_scale`` (None if the user has called ``unscale_``) and ``found_inf``. Kernels multiply gradients anyway, so
taking the scale out costs nothing; the host reads ``found_inf``, as the scaler itself would.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lamb.equations import statistic_dtype


def inverse(optimizer: Any) -> Tensor | None:
    """What takes the scale out of a gradient, a 0-dim tensor; None if there is no scale."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return None
    return 1 / scale.detach().to(statistic_dtype(scale.device)).reshape(())


def bound(optimizer: Any, group: Mapping[str, Any]) -> float | None:
    """``max_grad_value`` for gradients as they are, scale included."""
    limit = group["max_grad_value"]
    scale = getattr(optimizer, "grad_scale", None)
    return limit if limit is None or scale is None else limit * float(scale)


def found_overflow(optimizer: Any) -> bool | None:
    """Whether the scaler found an infinite or undefined gradient on this rank; None without a scaler."""
    found = getattr(optimizer, "found_inf", None)
    return None if found is None else bool(found)
