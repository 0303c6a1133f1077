"""`TrustRatioMonitor`: logs what LAMB does to every layer, and says when a layer does not train as meant."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.checks import one_of, regular_expression, whole_number
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.lightning_metric_seams import StepLog, is_logging_step
from lightning_lamb.lightning_seams import (
    Callback,
    LightningModule,
    Trainer,
    closes_window,
    inner_optimizer,
    rank_zero_warn,
)
from lightning_lamb.sharding.annotate import clean_name

Quantity = Literal["trust_ratio", "weight_norm", "update_norm"]
SOURCE: dict[str, str] = {
    "trust_ratio": "trust_ratios",
    "weight_norm": "weight_norms",
    "update_norm": "update_norms",
}


class TrustRatioMonitor(Callback):
    """Logs trust ratios, weight norms and update norms by layer name, and warns about layers that do not train.

    Logs at the Trainer's logging steps (log_every_n_steps) as ``trust_ratio/<layer>`` and so on, and warns at these
    steps without a logger too. The numbers are those that the optimizers' steps computed anyway: no communication, and
    nothing is read on the host between logging steps. With manual optimization it shows every Lamb and Lars; a layer
    name that several of them have gets "optimizer0." and so on before it.

    Args:
        quantities: What to log, of "trust_ratio", "weight_norm" and "update_norm".
        layers: A regular expression; only layers whose name contains a match are logged. None: all adapted layers.
        patience: For how many logging steps in a row a layer must not train, or a ratio sit on a bound, before that is
            worth a warning. Numbers that are not finite are told at once.

    Raises:
        InvalidOptionError: An option is out of range, or no optimizer has trust ratios.
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
        self._log = StepLog()
        self._streaks: dict[tuple[str, str], int] = {}
        self._warned: set[tuple[str, str]] = set()
        self._layers_seen = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a training in which no optimizer has trust ratios, and names those that have none."""
        self._streaks, self._warned, self._layers_seen = {}, set(), False
        without = [type(_inside(one)).__name__ for one in trainer.optimizers if not _has_ratios(one)]
        if len(without) == len(trainer.optimizers):
            named = " and ".join(without) if without else "no optimizer at all"
            raise InvalidOptionError(
                f"TrustRatioMonitor shows trust ratios, which {named} does not have: train with Lamb or Lars, or "
                "remove the callback."
            )
        if without:
            rank_zero_warn(f"TrustRatioMonitor shows nothing of {' and '.join(without)}, which has no trust ratios.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the last logging step's numbers out of Lightning's hands, which would look at them at every step."""
        self._log.forget()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs and checks the last optimizer steps, where the Trainer logs."""
        if not self._layers_seen and closes_window(trainer):
            self._look_for_layers(trainer)
        if not is_logging_step(trainer):
            return
        columns = self._columns(trainer)
        if not columns["trust_ratio"]:
            return
        if trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            shown = {f"{q}/{name}": value for q in self.quantities for name, value in columns[q].items()}
            self._log.log(trainer, pl_module, shown)
        if trainer.is_global_zero:
            self._check(trainer, columns)

    def _look_for_layers(self, trainer: Trainer) -> None:
        """Says, once there are ratios, that ``layers`` matches none of them."""
        names = [name for one in _monitored(trainer) for name in one.trust_ratios]
        self._layers_seen = bool(names)
        if names and not any(self.layers.search(name) for name in names):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            rank_zero_warn(
                f"TrustRatioMonitor(layers={self.layers.pattern!r}) matches none of the adapted layers, so nothing is "
                f"logged or checked. They are called {shown}."
            )

    def _columns(self, trainer: Trainer) -> dict[str, dict[str, Tensor]]:
        """Every quantity of the chosen layers of all optimizers, by name."""
        optimizers = list(enumerate(_monitored(trainer)))
        found = {q: [(i, getattr(one, source)) for i, one in optimizers] for q, source in SOURCE.items()}
        seen = Counter(name for _, values in found["trust_ratio"] for name in values)
        return {
            quantity: {
                _name(index, name, seen): value
                for index, values in parts
                for name, value in values.items()
                if self.layers.search(name)
            }
            for quantity, parts in found.items()
        }

    def _check(self, trainer: Trainer, columns: dict[str, dict[str, Tensor]]) -> None:
        """Warns about layers that do not train as meant, each layer and reason once."""
        names = list(columns["trust_ratio"])
        # One transfer for all layers; a logging step synchronises anyway.
        table = torch.stack([torch.stack(list(columns[q].values())).float() for q in SOURCE]).tolist()
        parts = [_ratio_bounds(optimizer) for optimizer in _monitored(trainer)]
        seen = Counter(name for one in _monitored(trainer) for name in one.trust_ratios)
        bounds = {_name(index, name, seen): pair for index, part in enumerate(parts) for name, pair in part.items()}
        found: dict[str, list[str]] = {}
        streaks: dict[tuple[str, str], int] = {}
        for name, ratio, weight_norm, update_norm in zip(names, *table, strict=True):
            reason, at_once = _reason(ratio, weight_norm, update_norm, bounds.get(name))
            if reason is None:
                continue
            key = name, reason
            streaks[key] = self._streaks.get(key, 0) + 1
            if (at_once or streaks[key] >= self.patience) and key not in self._warned:
                self._warned.add(key)
                found.setdefault(reason, []).append(name)
        self._streaks = streaks
        for reason, layers in found.items():
            shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
            rank_zero_warn(f"TrustRatioMonitor: {shown}: {reason}")


def _reason(
    ratio: float, weight_norm: float, update_norm: float, bounds: tuple[float, float] | None
) -> tuple[str | None, bool]:
    """What is wrong with one layer, and what to do, or None; and whether that is certain after one step."""
    if not (math.isfinite(weight_norm) and math.isfinite(update_norm) and math.isfinite(ratio)):
        return (
            "its norms are not finite. Look for NaN or Inf in its gradients: lower the learning rate, lengthen the "
            "warm-up, or set max_grad_norm."
        ), True
    if weight_norm == 0.0:  # as at the start of a layer initialised to zero, LoRA's say, which moves after one step
        return "all weights are still zero, so it does not train. Check its initialisation and its gradients.", False
    if update_norm == 0.0:  # as at the start of the layer before such a one
        return (
            "its update is zero, so it does not train. Check that the loss depends on it; if it is meant to be "
            "frozen, set requires_grad=False."
        ), False
    if ratio == 0.0:
        return "its trust ratio is 0, so it does not train. Check trust_ratio_bounds and weight_norm_bounds.", False
    if bounds is not None and ratio in bounds:
        return (
            f"its trust ratio sits on trust_ratio_bounds={bounds}, so it trains like plain Adam at a fixed "
            "multiple of the learning rate. Widen the bounds, or exempt the layer (adapt=False) if that is meant."
        ), False
    return None, False


def _monitored(trainer: Trainer) -> list[Any]:
    """The optimizers that have trust ratios."""
    return [_inside(optimizer) for optimizer in trainer.optimizers if _has_ratios(optimizer)]


def _has_ratios(optimizer: Any) -> bool:
    return hasattr(type(_inside(optimizer)), "trust_ratios")


def _inside(optimizer: Any) -> Any:
    """The Lamb inside Lightning's and ZeroRedundancyOptimizer's wrappers."""
    optimizer = inner_optimizer(optimizer)
    return getattr(optimizer, "optim", optimizer)


def _name(index: int, name: str, seen: Counter[str]) -> str:
    """A layer's name among those of all optimizers."""
    return name if seen[name] < 2 else f"optimizer{index}.{name}"


def _ratio_bounds(optimizer: Optimizer) -> dict[str, tuple[float, float]]:
    """The bounds of every layer whose group has any, by the name of its ratio, as float32 would hold them."""
    found = {}
    for group in optimizer.param_groups:
        bounds = group.get("trust_ratio_bounds")
        if bounds is not None:
            low, high = torch.tensor(bounds, dtype=torch.float32, device="cpu").tolist()
            found.update(dict.fromkeys(map(clean_name, group.get("param_names", [])), (low, high)))
    return found
