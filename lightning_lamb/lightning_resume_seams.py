"""Lightning's loops, loaders and iterators where a resumed ``fit`` continues.

As in `lightning_lamb.lightning_seams`, the functions say which attributes they read and write.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

from lightning_lamb.lightning_seams import Trainer


def loop_counters(trainer: Trainer) -> tuple[Any, Any]:
    """The present epoch's and micro-batch's counters (ready, started, processed, completed; ``is_last_batch``)."""
    loop = trainer.fit_loop
    return loop.epoch_progress.current, loop.epoch_loop.batch_progress


def begin_epoch_anew(trainer: Trainer) -> None:
    """Makes a resumed fit begin its epoch as if nothing had been resumed; call it in ``on_train_start``.

    Otherwise Lightning takes the first micro-batch for the end of an earlier epoch. Writes ``_restarting``.
    """
    loop = trainer.fit_loop
    loop._restarting = False
    loop.epoch_loop.restarting = False
    for inner in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        if hasattr(inner, "reset_restart_stage"):  # not in Lightning 2.5.0
            inner.reset_restart_stage()


def step_schedulers(trainer: Trainer, *, ends_epoch: bool) -> None:
    """Steps the schedulers as after a micro-batch that closed a window. Calls ``_update_learning_rates``."""
    loop = trainer.fit_loop.epoch_loop
    for config in trainer.lr_scheduler_configs:
        scheduler: Any = config.scheduler
        if getattr(scheduler, "_optimizer_steps", None) is not None:  # a StagedWarmup that waits for the step it saw
            scheduler._count_optimizer_step(scheduler.optimizer)
    for interval in ("step", "epoch") if ends_epoch else ("step",):
        loop._update_learning_rates(interval=interval, update_plateau_schedulers=False)


def silence_restart_warning() -> Callable[[], None]:
    """Keeps Lightning from warning that a loader without a state makes results unreliable, where that is not so.

    Returns:
        Lets it warn again.
    """
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
    added = [entry for entry in warnings.filters if not any(entry is other for other in before)]

    def restore() -> None:
        for entry in added:
            with contextlib.suppress(ValueError):
                warnings.filters.remove(entry)  # type: ignore[attr-defined]

    return restore


def count_steps_for_loggers(trainer: Trainer) -> None:
    """Makes the loggers' step the optimizer's, which a resumed fit may be one off. Writes ``_batches_that_stepped``."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def training_loaders(trainer: Trainer) -> list[Any]:
    """The training dataloaders that there are. Reads ``fit_loop._combined_loader``."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def replace_train_loaders(
    trainer: Trainer, replace: Callable[[list[Any]], list[Any]], states: list[Any] | None = None
) -> None:
    """Exchanges the training dataloaders that were made, and begins to iterate over the new ones.

    A new one with ``continue_with`` goes on with the iterator of the old one: a loader that got its state back from the
    checkpoint would begin anew with a second iterator, unless it gets ``states`` again before. Writes
    ``fit_loop._combined_loader.flattened`` and ``._iterator``, and iterates ``fit_loop._data_fetcher``.

    Args:
        trainer: between making the loaders and the first micro-batch.
        replace: gets the loaders and returns as many.
        states: of the loaders that have one; all begin to iterate from there.
    """
    combined, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    if combined is None or fetcher is None:
        return
    before = list(combined.flattened)
    after = replace(before)
    if all(old is new for old, new in zip(before, after)):
        return
    combined.flattened = after
    if states is not None:
        combined._load_state_dicts(states)
        iter(fetcher)
        return
    passes = combined._iterator
    kept = {
        i: passes.iterators[i] for i, new in enumerate(after) if passes is not None and hasattr(new, "continue_with")
    }
    if passes is not None and len(kept) == len(after):
        passes.iterables, passes.iterators = after, [new.continue_with(kept[i]) for i, new in enumerate(after)]
        return
    for i, iterator in kept.items():  # a loader with a state beside one without: only the latter begins a new pass
        combined.flattened[i].keep_iterator(iterator)
    iter(fetcher)


def skip_by_iterating(trainer: Trainer, micro_batches: int) -> bool:
    """Fetches and forgets micro-batches. Calls ``next(fit_loop._data_fetcher)``.

    Returns:
        Whether that was possible: not for a training_step that takes the iterator.
    """
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or hasattr(fetcher, "iterator_wrapper"):
        return False
    for _ in range(micro_batches):
        next(fetcher, None)
    fetcher.fetched = 0  # Lightning adds what the checkpoint counted
    return True


def loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """The states of stateful training loaders, as a checkpoint would hold them. Calls ``_state_dicts()``."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined._state_dicts()
