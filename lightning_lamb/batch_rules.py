"""How learning rate and warm-up follow from a global batch, as the user or a recipe says it.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning_lamb.checks import finite_number, one_of, whole_number
from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.recipes import recipe_named
from lightning_lamb.scaling import LRScaling, scaled_lr, scaled_warmup_fraction
from lightning_lamb.scaling import warmup_steps as steps_of_fraction

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclasses.dataclass(frozen=True)
class BatchRules:
    """How learning rate and warm-up follow from the global batch.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks.
        base_batch_size: the batch that base_lr and warmup_fraction belong to; None: to global_batch_size.
        base_lr: learning rate there; None: the optimizer's.
        warmup_fraction: share of the training that is warm-up there.
        warmup_steps: warm-up in optimizer steps, instead.
        lr_scaling: "sqrt", "linear" or "none".
    """

    global_batch_size: int
    base_batch_size: int | None = None
    base_lr: float | None = None
    warmup_fraction: float = 0.0
    warmup_steps: int | None = None
    lr_scaling: LRScaling = "sqrt"

    def __post_init__(self) -> None:
        """Checks every value."""
        whole_number("global_batch_size", self.global_batch_size)
        if self.base_batch_size is not None:
            whole_number("base_batch_size", self.base_batch_size)
        if self.base_lr is not None:
            finite_number("base_lr", self.base_lr, above=0.0)
        finite_number("warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0)
        if self.warmup_steps is not None:
            whole_number("warmup_steps", self.warmup_steps, at_least=0)
            if self.warmup_fraction:
                raise InvalidOptionError(
                    f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} both set the "
                    "warm-up: give one."
                )
        one_of("lr_scaling", self.lr_scaling, ("sqrt", "linear", "none"))
        if self.base_lr is not None and self.base_batch_size is None and self.lr_scaling != "none":
            raise InvalidOptionError(
                f"base_lr={self.base_lr} without base_batch_size: at which batch is it good? Give base_batch_size, or "
                f'lr_scaling="none" if it is the learning rate for {self.global_batch_size}.'
            )
        self._warmup_fraction()

    @property
    def asks_for_warmup(self) -> bool:
        """Whether a warm-up was asked for."""
        return bool(self.warmup_fraction or self.warmup_steps)

    @property
    def asks_about_rates(self) -> bool:
        """Whether anything here says what the learning rate is to be."""
        return self.asks_for_warmup or self.base_lr is not None or self._scale != 1.0

    def lr_factor(self, optimizer: Optimizer) -> float:
        """By how much an optimizer's learning rates are multiplied, once.

        With base_lr, the optimizer's default becomes that; groups with rates of their own keep their ratio to it.

        Raises:
            InvalidOptionError: base_lr, and an optimizer whose own rate is 0 or that has none.
        """
        if self.base_lr is None:
            return self._scale
        if "lr" not in optimizer.defaults:
            raise InvalidOptionError(
                f"base_lr={self.base_lr} cannot replace the learning rate of {type(optimizer).__name__}, which has no "
                "default lr: leave base_lr out and give the rate to its groups."
            )
        default = float(optimizer.defaults["lr"])
        if default <= 0.0:
            raise InvalidOptionError(
                f"base_lr={self.base_lr} cannot replace the optimizer's lr={default}: the groups' ratio to it is "
                "unknown. Give the optimizer a positive lr."
            )
        return self._scale * self.base_lr / default

    def warmup(self, total_steps: int, *, shorten: bool = False) -> int:
        """The warm-up in optimizer steps.

        Args:
            total_steps: optimizer steps of the training.
            shorten: cut a warm-up that is too long (Trainer's fast_dev_run) instead of refusing it.

        Raises:
            PlanError: it is longer than the training.
        """
        ramp = self.warmup_steps
        if ramp is None:
            ramp = steps_of_fraction(self._warmup_fraction(), total_steps)
        if ramp > total_steps and not shorten:
            raise PlanError(
                f"warmup_steps={ramp} is above the {total_steps} optimizer steps of this training (batches of "
                f"{self.global_batch_size}). Shorten the warm-up, or train for longer (max_epochs, max_steps)."
            )
        return min(ramp, total_steps)

    def describe_lr(self) -> str:
        """How the learning rate came about, for the summary."""
        source = "the optimizer's" if self.base_lr is None else f"{self.base_lr:g}"
        if self.base_batch_size is None or self.lr_scaling == "none":
            return f"{source}, not scaled"
        ratio = f"{self.global_batch_size} / {self.base_batch_size}"
        return f"{source} x {f'sqrt({ratio})' if self.lr_scaling == 'sqrt' else ratio}"

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from the rules in a checkpoint, one line each; the warm-up is compared by the schedule."""
        names = ("global_batch_size", "base_batch_size", "base_lr", "lr_scaling")
        return [
            f"{name}: {saved.get(name)} in the checkpoint, {getattr(self, name)} now"
            for name in names
            if saved.get(name) != getattr(self, name)
        ]

    @property
    def _base(self) -> int:
        return self.global_batch_size if self.base_batch_size is None else self.base_batch_size

    @property
    def _scale(self) -> float:
        return scaled_lr(1.0, self._base, self.global_batch_size, self.lr_scaling)

    def _warmup_fraction(self) -> float:
        return scaled_warmup_fraction(self.warmup_fraction, self._base, self.global_batch_size)

    @classmethod
    def of(
        cls,
        global_batch_size: int | None,
        base_batch_size: int | None,
        base_lr: float | None,
        warmup_fraction: float,
        warmup_steps: int | None,
        lr_scaling: str | None,
        recipe: str | None,
    ) -> BatchRules:
        """The rules from LargeBatch's arguments, completed from a recipe.

        Raises:
            InvalidOptionError: no global batch, an unknown recipe, or a value out of range.
        """
        scaling = None if lr_scaling is None else cast("LRScaling", lr_scaling)
        if recipe is not None:
            anchor = recipe_named(recipe)
            global_batch_size = anchor.stages[0].global_batch_size if global_batch_size is None else global_batch_size
            base_batch_size = anchor.base_batch_size if base_batch_size is None else base_batch_size
            base_lr = anchor.base_lr if base_lr is None else base_lr
            scaling = anchor.lr_scaling if scaling is None else scaling
            if not warmup_fraction and warmup_steps is None:
                warmup_fraction = anchor.warmup_fraction
        if global_batch_size is None:
            raise InvalidOptionError(
                "LargeBatch needs global_batch_size (samples per optimizer step over all ranks), stages or a recipe."
            )
        return cls(global_batch_size, base_batch_size, base_lr, warmup_fraction, warmup_steps, scaling or "sqrt")
