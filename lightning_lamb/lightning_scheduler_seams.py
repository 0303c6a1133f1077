"""Who decides about learning rates in Lightning: its command line, which makes schedulers, and its LearningRateFinder.

As in `lightning_lamb.lightning_seams`, the functions say which attributes they read.
"""

from __future__ import annotations

from torch import nn

from lightning_lamb.lightning_seams import Callback, Trainer, pl


def made_by_stock_cli(module: nn.Module) -> bool:
    """Whether LightningCLI's own ``configure_optimizers`` stands in the module's place, and nobody's override of it.

    Reads the instance's attribute that ``LightningCLI._add_configure_optimizers_method_to_model`` writes.
    """
    method = vars(module).get("configure_optimizers")
    made = getattr(getattr(method, "__func__", None), "func", None)  # a method of a functools.partial
    where = getattr(made, "__module__", "")
    return where == f"{pl.__name__}.cli" and getattr(made, "__qualname__", "") == "LightningCLI.configure_optimizers"


def rate_finder(trainer: Trainer) -> Callback | None:
    """The LearningRateFinder among the callbacks, if any; ``Tuner.lr_find`` puts one there for its ``fit``."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next(
        (one for one in callbacks if any(kind.__name__ == "LearningRateFinder" for kind in type(one).__mro__)), None
    )


def stops_after_search(finder: Callback) -> bool:
    """Whether a LearningRateFinder ends its ``fit`` when it has found something. Reads ``_early_exit``."""
    return bool(getattr(finder, "_early_exit", False))
