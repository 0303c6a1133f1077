"""`TrustRatioMonitor`: logs what LAMB does to every layer, and says when a layer does not train as meant."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.checks import one_of, regular_expression, whole_number
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.lightning_metric_seams import is_logging_step
from lightning_lamb.lightning_seams import (
    Callback,
    LightningModule,
    Trainer,
    inner_optimizer,
    rank_zero_warn,
)

Quantity = Literal["trust_ratio", "weight_norm", "update_norm"]
SOURCE: dict[str, str] = {
    "trust_ratio": "trust_ratios",
    "weight_norm": "weight_norms",
    "update_norm": "update_norms",
}


class TrustRatioMonitor(Callback):
    """Logs trust ratios, weight norms and update norms by layer name, and warns about layers that do not train.

    Logs at the Trainer's logging steps (log_every_n_steps) as ``trust_ratio/<layer>`` and so on. The numbers are those
    that the optimizer's step computed anyway: no communication, and nothing is read on the host between logging steps.

    Args:
        quantities: What to log, of "trust_ratio", "weight_norm" and "update_norm".
        layers: A regular expression; only layers whose name contains a match are logged. None: all adapted layers.
        patience: For how many logging steps in a row a ratio must sit on a bound before that is worth a warning.

    Raises:
        InvalidOptionError: An option is out of range, or the optimizer has no trust ratios.
    """

    def __init__(
        self,
        quantities: list[Quantity] | None = None,
        layers: str | None = None,
        patience: int = 3,
    ) -> None:
        super().__init__()
        self.quantities = list(SOURCE) if quantities is None else [one_of("quantities", q, SOURCE) for q in quantities]
        self.layers = regular_expression("layers", layers or "")
        self.patience = whole_number("patience", patience)
        self._steps_on_bound: dict[str, int] = {}
        self._warned: set[tuple[str, str]] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses an optimizer without trust ratios."""
        for optimizer in trainer.optimizers:
            if not hasattr(_inside(optimizer), "trust_ratios"):
                raise InvalidOptionError(
                    f"TrustRatioMonitor shows trust ratios, which {type(_inside(optimizer)).__name__} does not have: "
                    "train with Lamb or Lars, or remove the callback."
                )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs and checks the last optimizer step, where the Trainer logs."""
        if not is_logging_step(trainer):
            return
        optimizer = _inside(trainer.optimizers[0])
        for quantity in self.quantities:
            values = self._selected(optimizer, quantity)
            pl_module.log_dict({f"{quantity}/{name}": value for name, value in values.items()}, rank_zero_only=True)
        if trainer.is_global_zero:
            self._check(optimizer)

    def _selected(self, optimizer: Optimizer, quantity: str) -> dict[str, Tensor]:
        """One quantity of the chosen layers."""
        values: dict[str, Tensor] = getattr(optimizer, SOURCE[quantity])
        return {name: value for name, value in values.items() if self.layers.search(name)}

    def _check(self, optimizer: Optimizer) -> None:
        """Warns about layers that do not train as meant, each layer and reason once."""
        columns = {quantity: self._selected(optimizer, quantity) for quantity in SOURCE}
        names = list(columns["trust_ratio"])
        if not names:
            return
        # One transfer for all layers; a logging step synchronises anyway.
        table = torch.stack([torch.stack(list(columns[q].values())).float() for q in SOURCE]).tolist()
        bounds = {name: bounds for name, bounds in _ratio_bounds(optimizer).items() if name in columns["trust_ratio"]}
        found: dict[str, list[str]] = {}
        for name, ratio, weight_norm, update_norm in zip(names, *table, strict=True):
            reason = self._reason(name, ratio, weight_norm, update_norm, bounds.get(name))
            if reason is not None and (name, reason) not in self._warned:
                self._warned.add((name, reason))
                found.setdefault(reason, []).append(name)
        for reason, layers in found.items():
            shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
            rank_zero_warn(f"TrustRatioMonitor: {shown}: {reason}")

    def _reason(
        self, name: str, ratio: float, weight_norm: float, update_norm: float, bounds: tuple[float, float] | None
    ) -> str | None:
        """What is wrong with one layer, and what to do, or None."""
        if not (math.isfinite(weight_norm) and math.isfinite(update_norm) and math.isfinite(ratio)):
            return (
                "its norms are not finite. Look for NaN or Inf in its gradients: lower the learning rate, lengthen the "
                "warm-up, or set max_grad_norm."
            )
        if weight_norm == 0.0:
            return (
                "all weights are zero, so its trust ratio is 1 and it takes plain Adam steps. That is right for a "
                "layer initialised to zero and passes after a step; otherwise check its initialisation."
            )
        if update_norm == 0.0:
            return (
                "its update is zero, so it does not train. Check that the loss depends on it; if it is meant to be "
                "frozen, set requires_grad=False."
            )
        if ratio == 0.0:
            return "its trust ratio is 0, so it does not train. Check trust_ratio_bounds and weight_norm_bounds."
        on_bound = bounds is not None and ratio in bounds
        self._steps_on_bound[name] = self._steps_on_bound.get(name, 0) + 1 if on_bound else 0
        if self._steps_on_bound[name] >= self.patience:
            return (
                f"its trust ratio sits on trust_ratio_bounds={bounds}, so it trains like plain Adam at a fixed "
                "multiple of the learning rate. Widen the bounds, or exempt the layer (adapt=False) if that is meant."
            )
        return None


def _inside(optimizer: Any) -> Any:
    """The Lamb inside Lightning's and ZeroRedundancyOptimizer's wrappers."""
    optimizer = inner_optimizer(optimizer)
    return getattr(optimizer, "optim", optimizer)


def _ratio_bounds(optimizer: Optimizer) -> dict[str, tuple[float, float]]:
    """The bounds of every layer whose group has any, by name, as float32 would hold them."""
    found = {}
    for group in optimizer.param_groups:
        bounds = group.get("trust_ratio_bounds")
        if bounds is not None:
            low, high = torch.tensor(bounds, dtype=torch.float32, device="cpu").tolist()
            found.update(dict.fromkeys(group.get("param_names", []), (low, high)))
    return found
