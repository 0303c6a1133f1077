"""What Lightning's gradient clipping is asked for, and by what a GradScaler has multiplied the gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.checks import one_of
from lightning_lamb.errors import ConflictError, InvalidOptionError


def asked_clipping(trainer: Any, value: Any, algorithm: Any) -> tuple[float, str]:
    """The bound and the kind of clipping that ``LightningModule.clip_gradients`` would apply, after its refusals.

    Args:
        trainer: the Trainer, or None.
        value: the bound that was passed; None: the Trainer's.
        algorithm: "norm" or "value" that was passed; None: the Trainer's, else "norm".

    Raises:
        ConflictError: the Trainer says something else.
        InvalidOptionError: no number, or no such algorithm.
    """
    of_trainer = getattr(trainer, "gradient_clip_val", None)
    if value is not None and of_trainer is not None and value != of_trainer:
        raise ConflictError(
            f"Trainer(gradient_clip_val={of_trainer}) and clip_gradients(gradient_clip_val={value}) give different "
            "bounds: leave one of them out."
        )
    value = (of_trainer or 0.0) if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidOptionError(f"gradient_clip_val={value!r} must be a number, or None for the Trainer's.")
    kind_of_trainer = getattr(trainer, "gradient_clip_algorithm", None)
    kind = _text(kind_of_trainer) or "norm"
    if algorithm is not None:
        kind = one_of("gradient_clip_algorithm", _text(algorithm), ("norm", "value"))
        if kind_of_trainer is not None and _text(kind_of_trainer) != kind:
            raise ConflictError(
                f"Trainer(gradient_clip_algorithm={_text(kind_of_trainer)!r}) and "
                f"clip_gradients(gradient_clip_algorithm={kind!r}) differ: leave one of them out."
            )
    return value, kind


def _text(algorithm: Any) -> Any:
    """The name of an algorithm, which the Trainer holds as an enumeration."""
    algorithm = getattr(algorithm, "value", algorithm)
    return algorithm.lower() if isinstance(algorithm, str) else algorithm


def grad_scaler(trainer: Any) -> Any:
    """The precision plugin's GradScaler, or None. Reads ``precision_plugin.scaler``."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def loss_scale_of(scaler: Any, optimizer: Optimizer) -> Tensor | None:
    """By what the optimizer's gradients are multiplied now, a 0-dim tensor; None if the scale is out of them.

    Reads ``_per_optimizer_states`` and ``_get_scale_async()`` of a `torch.amp.GradScaler`; no host synchronisation.
    """
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    if stage.name != "READY" or scaler._scale is None:
        return None
    scale: Tensor = scaler._get_scale_async()
    return scale.reshape(())
