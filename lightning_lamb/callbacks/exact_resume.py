"""Keeps and restores what a run must know to continue bit for bit from any micro-batch.

A checkpoint describes the start of the window it was saved in: the position in the data, the random numbers, buffers
(running statistics) and the states of stateful dataloaders. Weights, moments and schedules have not moved since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_lamb.callbacks.data_order import DataOrder, resumable, skips_by_index
from lightning_lamb.callbacks.data_streams import is_stateful
from lightning_lamb.callbacks.order_seeds import OrderSeeds
from lightning_lamb.callbacks.position import (
    Position,
    count_micro_batch,
    has_uncounted_micro_batch,
    position_of_foreign,
    present_position,
    write_position,
)
from lightning_lamb.callbacks.random_states import RandomStates, TrainingRandomness
from lightning_lamb.callbacks.unsaved_state import UnsavedState
from lightning_lamb.callbacks.window_buffers import WindowBuffers
from lightning_lamb.callbacks.worker_seeds import worker_seeding
from lightning_lamb.lightning_rank_seams import gather_over_ranks
from lightning_lamb.lightning_resume_seams import (
    begin_epoch_anew,
    count_steps_for_loggers,
    loader_states,
    replace_train_loaders,
    silence_restart_warning,
    skip_by_iterating,
    step_schedulers,
    training_loaders,
)
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    closes_window,
    data_parallel_size,
    device_of,
    inner_optimizer,
    rank_zero_warn,
    scheduler_configs,
)
from lightning_lamb.step_hooks import after_each_step


class ExactResume:
    """What one ``fit`` keeps for a checkpoint, and takes from one.

    Args:
        enabled: False leaves dataloaders and random numbers alone.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._resumed_at: Position | None = None
        self._saved: dict[str, Any] = {}
        self._randomness: TrainingRandomness | None = None
        self._order: DataOrder | None = None
        self._buffers = WindowBuffers()
        self._loader_states: list[dict[str, Any]] = []
        self._restored_states: list[Any] = []
        self._unsaved = UnsavedState()
        self._first_micro_batch = False
        self._hooks: list[Any] = []
        self._has_stepped = False
        self._has_states = False
        self._module: LightningModule | None = None
        self._restore_warnings: Callable[[], None] = _nothing

    # ---- training

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes over dataloaders and random numbers, before the first micro-batch of a ``fit``."""
        position, saved = self._resumed_at, self._saved
        self._resumed_at, self._saved = None, {}
        self._first_micro_batch = position is not None
        self._watch_steps(trainer)
        if position is not None:
            if saved.get("schedules_pending"):
                step_schedulers(trainer, ends_epoch=position.micro_batches == 0)
            if position.micro_batches == 0:
                begin_epoch_anew(trainer)
        self._module = module
        if not self.enabled:
            self._order, self._randomness = None, None
            self.take_loaders(trainer)
            return
        states = _of_rank(saved, trainer.global_rank)
        self._randomness = TrainingRandomness(device_of(module), states)
        seeds = OrderSeeds.of(saved, trainer.global_rank, lambda seed: gather_over_ranks(trainer, seed))
        ranks = data_parallel_size(trainer)
        self._order = DataOrder(self._randomness, lambda: trainer.current_epoch, seeds, ranks)
        if position is not None:
            self._order.begin_at(position.epoch, position.micro_batches)
        begins_pass = position is not None and position.micro_batches == 0
        reasons = self.take_loaders(trainer, self._restored_states if begins_pass else None)
        self._restored_states = []
        if position is not None:
            left_out = [*_skipped_plateaus(trainer, position), *_frozen_again(saved, module)]
            self._tell(position, [*reasons, *_reasons(saved, trainer), *left_out])

    def _tell(self, position: Position, reasons: list[str]) -> None:
        """Says why a resumed run may not be the one that was not stopped; otherwise Lightning need not warn either."""
        if reasons:
            rank_zero_warn(
                f"LargeBatch: the run that continues at micro-batch {position.micro_batches} of epoch {position.epoch} "
                f"may differ from one that was not stopped: {'; '.join(reasons)}."
            )
        else:
            self._restore_warnings = silence_restart_warning()

    def _watch_steps(self, trainer: Trainer) -> None:
        """Notes every optimizer step at once: Lightning counts it later, and a checkpoint may be saved in between."""
        self.stop()
        self._has_stepped = False
        hooks = [after_each_step(inner_optimizer(one), self._note_step) for one in trainer.optimizers]
        self._hooks = [hook for hook in hooks if hook is not None]

    def _note_step(self, _: Any) -> None:
        self._has_stepped = True

    def stop(self) -> None:
        """Leaves optimizers and Python's warnings as they were, when a ``fit`` ends or fails."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._restore_warnings()

    def take_loaders(self, trainer: Trainer, states: list[Any] | None = None) -> list[str]:
        """Replaces dataloaders, where there are new ones, and skips what was seen.

        Args:
            trainer: before the first micro-batch of an epoch.
            states: of stateful loaders, which are to begin anew from there.

        Returns:
            Why the data may not be what an unbroken run would see.
        """
        loaders: list[Any] = training_loaders(trainer)
        self._has_states = any(is_stateful(loader) for loader in loaders)
        self._keep_loader_states(trainer)  # a window begins here
        order = self._order
        if order is None:
            return []
        if self._module is not None:
            self._buffers.find(self._module)
        self._buffers.keep()

        def replace(before: list[Any]) -> list[Any]:
            after = [resumable(loader, i, order, skips=len(before) == 1) for i, loader in enumerate(before)]
            fresh = [old for old, new in zip(before, after) if old is not new]
            if fresh:
                self._unsaved.watch(fresh)
            return after

        replace_train_loaders(trainer, replace, states)
        if not order.skip():
            return []
        if _skips_itself(loaders):
            return _what_skipping_misses(loaders)
        with order.randomness.undisturbed():
            has_skipped = skip_by_iterating(trainer, order.skip())
        order.begin_at(-1, 0)
        if has_skipped:
            return []
        reason = (
            "training_step takes the iterator of the dataloader, so what this epoch has seen already cannot be skipped "
            "and its data begins anew; give the dataloader state_dict and load_state_dict"
        )
        return [reason]

    def _keep_loader_states(self, trainer: Trainer) -> None:
        """Copies the states of stateful loaders."""
        self._loader_states = [_copied(state) for state in loader_states(trainer)] if self._has_states else []

    def begin_micro_batch(self, trainer: Trainer) -> None:
        """Restores training's random numbers, if fetching the batch has not."""
        if self._randomness is not None:
            self._randomness.enter()
        if self._first_micro_batch:
            self._first_micro_batch = False
            self._restore_warnings()
            count_steps_for_loggers(trainer)

    def end_micro_batch(self, trainer: Trainer) -> None:
        """Keeps the random numbers, and at the end of a window what the next one starts from."""
        closed = closes_window(trainer)
        self._has_stepped = False
        if self._randomness is not None:
            self._randomness.leave(closes_window=closed)
            if closed:
                self._buffers.keep()
        if closed and self._has_states:
            self._keep_loader_states(trainer)

    # ---- checkpoints

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; where a window is open, buffers and loader states in it become those of its start.

        Args:
            trainer: every rank calls this; random states are gathered from all.
            checkpoint: as Lightning made it, modified in place.

        Returns:
            Tensors and plain values.
        """
        position, closed = present_position(trainer, has_stepped=self._has_stepped)
        saved: dict[str, Any] = {"epoch": position.epoch, "micro_batches": position.micro_batches}
        if self._module is not None:
            saved["trainable"] = [
                name for name, parameter in self._module.named_parameters() if parameter.requires_grad
            ]
        if self._has_stepped and has_uncounted_micro_batch(trainer):
            count_micro_batch(checkpoint)
            saved["schedules_pending"] = True  # Lightning steps them after it has counted
        if not closed:
            self._buffers.write(checkpoint)
            if position.micro_batches:  # a run without LargeBatch continues there too
                same = trainer.accumulate_grad_batches, 1
                write_position(checkpoint, position, same, same)
        loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        if not closed or "combined_loader" not in loops:  # after trainer.test there are no loaders any more
            loops.pop("combined_loader", None)
            if self._loader_states:
                loops["combined_loader"] = self._loader_states
        if self._randomness is None or self._order is None:
            return saved
        states = self._randomness.now_or_at_start(closed=closed)
        own: tuple[dict[str, Any], list[Any]] = states.pack(), loops.get("combined_loader", [])
        # After an exception the other ranks may not be there any more.
        gathered = [own] if trainer.interrupted else gather_over_ranks(trainer, own)
        loaders = [rank_states for _, rank_states in gathered]
        if len(gathered) > 1 and any(loaders):  # Lightning's checkpoint has those of rank 0
            saved["loader_states"] = loaders
        saved["unsaved"] = self._unsaved.changed()
        return {**saved, **self._order.seeds.save(), **_without_copies([packed for packed, _ in gathered])}

    def load(self, trainer: Trainer, position: Position, saved: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Remembers a checkpoint until training starts.

        Args:
            trainer: the states of this rank's dataloaders become the checkpoint's.
            position: in this run's micro-batches.
            saved: what `save` returned; {} for a checkpoint of a run without LargeBatch.
            checkpoint: modified in place.
        """
        self._resumed_at, self._saved = position, saved
        loops = checkpoint["loops"]["fit_loop"]["state_dict"]
        of_rank = saved.get("loader_states", [])
        if len(of_rank) == trainer.world_size:
            loops.pop("combined_loader", None)
            if of_rank[trainer.global_rank]:
                loops["combined_loader"] = of_rank[trainer.global_rank]
        self._restored_states = loops.get("combined_loader", [])

    def load_foreign(self, trainer: Trainer, checkpoint: dict[str, Any], *, rounds_down: bool) -> Position | None:
        """Remembers where in an epoch a run without LargeBatch was; see `position_of_foreign`."""
        position = position_of_foreign(checkpoint, trainer.accumulate_grad_batches, rounds_down=rounds_down)
        if position is not None:
            self.load(trainer, write_position(checkpoint, position, (1, 1), (1, 1)), {}, checkpoint)
        return position


def _nothing() -> None:
    """Lightning may warn."""


def _reasons(saved: dict[str, Any], trainer: Trainer) -> list[str]:
    """Why what a checkpoint holds may not be all that a run depends on."""
    reasons = list(saved.get("unsaved", []))
    if not saved.get("order_seed"):
        reasons.append("the checkpoint holds no random numbers, so the order of shuffled data is another one")
    ranks = len(saved["order_seed"]) if isinstance(saved.get("order_seed"), list) else 0
    if len(saved.get("random_state_of_rank", [])) < ranks == trainer.world_size:
        reasons.append("it was saved while an exception was raised, with the random numbers of one rank only")
    return reasons


def _skipped_plateaus(trainer: Trainer, position: Position) -> list[str]:
    """Schedulers that Lightning does not step at the end of the epoch that a checkpoint is from, having no metrics."""
    return [
        f"Lightning does not step {type(config.scheduler).__name__} (interval='epoch') at the end of the epoch that "
        "the checkpoint was saved in"
        for config in scheduler_configs(trainer)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (position.micro_batches or config.scheduler.last_epoch * config.frequency < position.epoch)
    ]


def _frozen_again(saved: dict[str, Any], module: LightningModule) -> list[str]:
    """Layers that a callback had unfrozen, as BaseFinetuning does: it freezes them before a resumed training, too."""
    trainable = set(saved.get("trainable", []))
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad and name in trainable]
    if not frozen:
        return []
    shown = ", ".join(frozen[:3]) + (f" and {len(frozen) - 3} more" if len(frozen) > 3 else "")
    return [
        f"frozen now, and trained when the checkpoint was saved: {shown}; unfreeze them in on_fit_start of the module"
    ]


def _skips_itself(loaders: list[Any]) -> bool:
    """Whether the loaders continue where they were without being iterated."""
    if any(is_stateful(loader) for loader in loaders):
        return True  # what Lightning restored must not be moved
    return len(loaders) == 1 and skips_by_index(loaders[0])


def _what_skipping_misses(loaders: list[Any]) -> list[str]:
    """What is not repeated where only indices, or only the loaders with a state, are skipped."""
    if len(loaders) > 1 and not all(is_stateful(loader) for loader in loaders):
        return ["a dataloader with a state and one without are combined, and only the former continues"]
    loader = loaders[0]
    repeats = is_stateful(loader) or isinstance(getattr(loader, "dataset", None), IterableDataset)
    if getattr(loader, "num_workers", 0) and not repeats and worker_seeding(loader) is None:
        return [f"worker_init_fn of {type(loader).__name__} seeds its workers, which begin anew; leave it out"]
    return []


def _copied(state: Any) -> Any:
    """A copy of a loader's state, which may be the loader's own dict."""
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state.clone() if isinstance(state, Tensor) else state


def _without_copies(gathered: list[dict[str, Any]]) -> dict[str, Any]:
    """Random states by rank; ranks that were seeded alike share one."""
    states: list[dict[str, Any]] = []
    of_rank: list[int] = []
    for packed in gathered:
        index = next((index for index, state in enumerate(states) if _same(state, packed)), len(states))
        if index == len(states):
            states.append(packed)
        of_rank.append(index)
    return {"random_states": states, "random_state_of_rank": of_rank}


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two packed random states are equal."""
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        for name, value in left.items()
    )


def _of_rank(saved: dict[str, Any], rank: int) -> RandomStates | None:
    """This rank's random states in a checkpoint; None: a rank that it has none of goes on with its own."""
    of_rank = saved.get("random_state_of_rank", [])
    return RandomStates.unpack(saved["random_states"][of_rank[rank]]) if rank < len(of_rank) else None
