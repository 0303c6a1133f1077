"""The Trainer's training data: when it is set up, which loaders there are, and how many steps they make.

As in `lightning_lamb.lightning_seams`, the functions say which attributes they read and write.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lightning_lamb.lightning_seams import (
    Trainer,
    drop_train_data_before_resume,
    load_train_data,
    pl,
    total_optimizer_steps,
    train_data_source,
)


def after_setup(trainer: Trainer, act: Callable[[], object]) -> Callable[[], None]:
    """Calls ``act`` once, when data module, callbacks and module have all been set up, and before ``configure_model``.

    Lightning has no hook there: it calls every ``setup``, the module's last, and ``strategy.barrier("post_setup")``.
    That method is replaced on this one strategy until then. No object of the user's is touched, so whatever ``setup`` a
    module has, and whoever copies the module in between, nothing of this is left in it.

    Args:
        trainer: before the last ``setup`` of a run.
        act: on every rank, after the barrier.

    Returns:
        Puts the method back if the moment never came (a ``setup`` raised); without effect afterwards.
    """
    strategy: Any = trainer.strategy
    earlier = vars(strategy).get("barrier")
    original = strategy.barrier
    waiting = True

    def put_back() -> None:
        nonlocal waiting
        waiting = False
        if vars(strategy).get("barrier") is barrier:  # otherwise somebody wrapped it again, and it only passes on
            del strategy.barrier
            if earlier is not None:
                strategy.barrier = earlier

    def barrier(*args: Any, **kwargs: Any) -> Any:
        is_moment = waiting and (args[0] if args else kwargs.get("name")) == "post_setup"
        if is_moment:
            put_back()
        result = original(*args, **kwargs)
        if is_moment:
            act()
        return result

    strategy.barrier = barrier
    return put_back


def loaders_in_sight(trainer: Trainer) -> list[Any] | None:
    """The training loaders that exist already, made or handed to ``fit``; nothing is loaded or iterated.

    Reads ``fit_loop._combined_loader``.

    Returns:
        None: ``train_dataloader`` has not been called yet.
    """
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        source = train_data_source(trainer)
        if source is None or hasattr(source, "train_dataloader"):
            return None
        combined_loader = importlib.import_module(f"{pl.__name__}.utilities").CombinedLoader
        combined = source if isinstance(source, combined_loader) else combined_loader(source, "max_size_cycle")
    return list(combined.flattened)


def make_train_loaders(trainer: Trainer) -> list[Any]:
    """Makes the training loaders before the model is configured, whose random numbers stay those of Lightning alone."""
    utilities = importlib.import_module(f"{pl.__name__}.utilities.seed")
    with utilities.isolate_rng():
        return load_train_data(trainer)


def combines_in_turn(trainer: Trainer) -> bool:
    """Whether several training loaders are used one after the other. Reads ``_combined_loader`` and its ``_mode``."""
    combined = trainer.fit_loop._combined_loader
    mode = getattr(train_data_source(trainer) if combined is None else combined, "_mode", None)
    return mode == "sequential"


def steps_before(trainer: Trainer) -> int:
    """Optimizer steps of earlier fits of this Trainer, which an optimizer that is made now does not take.

    A checkpoint brings the steps before it, and counts them in the schedule. Reads ``_loaded_checkpoint``.
    """
    resumes = trainer._checkpoint_connector._loaded_checkpoint or trainer.strategy.restore_checkpoint_after_setup
    return 0 if resumes else trainer.global_step


def steps_ahead(trainer: Trainer) -> int:
    """How many optimizer steps an optimizer that is made now will take: in a further ``fit``, those that are left.

    Call it before a checkpoint is restored: dataloaders that had to be made to know are forgotten then, because they
    would not get their position back.

    Raises:
        PlanError: see `total_optimizer_steps`.
    """
    total = total_optimizer_steps(trainer)
    drop_train_data_before_resume(trainer)
    left = total - steps_before(trainer)
    return left if left > 0 else total


def training_step_takes_iterator(trainer: Trainer) -> bool:
    """Whether it is ``training_step(self, dataloader_iter)``, whose batch hooks do not see. Reads ``_data_fetcher``."""
    return hasattr(trainer.fit_loop._data_fetcher, "iterator_wrapper")
