"""Keeps and restores what a run must know to continue bit for bit from any micro-batch.

A checkpoint describes the start of the window it was saved in: the position in the data, the random numbers, buffers
(running statistics) and the states of stateful dataloaders. Weights, moments and schedules have not moved since.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lamb.callbacks.data_order import DataOrder, resumable, skips_by_index
from lightning_lamb.callbacks.data_streams import is_stateful
from lightning_lamb.callbacks.order_seeds import OrderSeeds
from lightning_lamb.callbacks.position import Position, present_position
from lightning_lamb.callbacks.random_states import RandomStates, TrainingRandomness
from lightning_lamb.lightning_resume_seams import (
    begin_epoch_anew,
    count_steps_for_loggers,
    gather_over_ranks,
    loader_states,
    replace_train_loaders,
    skip_by_iterating,
)
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    closes_window,
    data_parallel_size,
    device_of,
    rank_zero_warn,
)
from lightning_lamb.sharding.annotate import clean_name


class ExactResume:
    """What one ``fit`` keeps for a checkpoint, and takes from one.

    Args:
        enabled: False leaves dataloaders and random numbers alone.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.is_failing = False
        """An exception is on its way: other ranks may not be there any more, so nothing is gathered from them."""
        self._resumed_at: Position | None = None
        self._saved: dict[str, Any] = {}
        self._randomness: TrainingRandomness | None = None
        self._order: DataOrder | None = None
        self._buffers = WindowBuffers()
        self._loader_states: list[dict[str, Any]] = []
        self._restored_states: list[Any] = []
        self._first_micro_batch = False

    # ---- training

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes over dataloaders and random numbers, before the first micro-batch of a ``fit``."""
        position, saved = self._resumed_at, self._saved
        self._resumed_at, self._saved, self.is_failing = None, {}, False
        self._first_micro_batch = position is not None
        if position is not None and position.micro_batches == 0:
            begin_epoch_anew(trainer)
        self._buffers.keep(module)
        self._loader_states = [_copied(state) for state in loader_states(trainer)]
        if not self.enabled:
            return
        states = _of_rank(saved, trainer.global_rank)
        self._randomness = TrainingRandomness(device_of(module), states)
        seeds = OrderSeeds.of(saved, trainer.global_rank, lambda seed: gather_over_ranks(trainer, seed))
        ranks = data_parallel_size(trainer)
        self._order = DataOrder(self._randomness, lambda: trainer.current_epoch, seeds, ranks)
        if position is not None:
            self._order.begin_at(position.epoch, position.micro_batches)
        begins_pass = position is not None and position.micro_batches == 0
        self.take_loaders(trainer, self._restored_states if begins_pass else None)
        self._restored_states = []

    def take_loaders(self, trainer: Trainer, states: list[Any] | None = None) -> None:
        """Replaces dataloaders, where there are new ones, and skips what was seen.

        Args:
            trainer: before the first micro-batch of an epoch.
            states: of stateful loaders, which are to begin anew from there.
        """
        self._loader_states = [_copied(state) for state in loader_states(trainer)]  # a window begins here
        order = self._order
        if order is None:
            return
        loaders: list[Any] = []

        def replace(before: list[Any]) -> list[Any]:
            loaders.extend(before)
            alone = len(before) == 1
            return [resumable(loader, index, order, skips=alone) for index, loader in enumerate(before)]

        replace_train_loaders(trainer, replace, states)
        with order.randomness.undisturbed():
            has_skipped = not order.skip() or _skips_itself(loaders) or skip_by_iterating(trainer, order.skip())
        if not has_skipped:
            rank_zero_warn(
                f"LargeBatch cannot skip the {order.skip()} micro-batches that this epoch has seen already, because "
                "training_step takes the iterator of the dataloader: the data begins anew. Give the dataloader "
                "state_dict and load_state_dict to continue exactly."
            )
        if order.skip() and not _skips_itself(loaders):
            order.begin_at(-1, 0)

    def begin_micro_batch(self, trainer: Trainer) -> None:
        """Restores training's random numbers, if fetching the batch has not."""
        if self._randomness is not None:
            self._randomness.enter()
        if self._first_micro_batch:
            self._first_micro_batch = False
            count_steps_for_loggers(trainer)

    def end_micro_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Keeps the random numbers, and at the end of a window what the next one starts from."""
        closed = closes_window(trainer)
        if self._randomness is not None:
            self._randomness.leave(closes_window=closed)
        if closed:
            self._buffers.keep(module)
            self._loader_states = [_copied(state) for state in loader_states(trainer)]

    # ---- checkpoints

    def save(self, trainer: Trainer, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds; where a window is open, buffers and loader states in it become those of its start.

        Args:
            trainer: every rank calls this; random states are gathered from all.
            checkpoint: as Lightning made it, modified in place.

        Returns:
            Tensors and plain values.
        """
        position, closed = present_position(trainer)
        if not closed:
            self._buffers.write(checkpoint.get("state_dict", {}))
            loops = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
            loops.pop("combined_loader", None)
            if self._loader_states:
                loops["combined_loader"] = self._loader_states
        saved: dict[str, Any] = {"epoch": position.epoch, "micro_batches": position.micro_batches}
        if self._randomness is None or self._order is None:
            return saved
        states = self._randomness.now_or_at_start(closed=closed)
        gathered = [states.pack()]
        if not self.is_failing and trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, gathered[0])
            gathered = everyone
        return {**saved, **self._order.seeds.save(), **_without_copies(gathered)}

    def load(self, position: Position, saved: dict[str, Any], checkpoint: dict[str, Any]) -> None:
        """Remembers a checkpoint until training starts.

        Args:
            position: in this run's micro-batches.
            saved: what `save` returned.
            checkpoint: holds the states of stateful dataloaders too.
        """
        self._resumed_at, self._saved = position, saved
        self._restored_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])


class WindowBuffers:
    """Copies of a module's buffers as they were when the window began."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, module: nn.Module) -> None:
        """Copies all buffers, into the last copies where they fit; no host synchronisation.

        Their version counters would not tell which changed: batch norm's kernels move statistics without counting.
        """
        for name, buffer in module.named_buffers():
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.device != buffer.device or copy.dtype != buffer.dtype:
                self._copies[name] = buffer.detach().clone()
            else:
                copy.copy_(buffer)

    def write(self, state_dict: dict[str, Any]) -> None:
        """Puts the copies in the places of the buffers in a state dict."""
        places = {clean_name(name): name for name in state_dict}
        for name, copy in self._copies.items():
            place = places.get(clean_name(name))
            if place is not None and state_dict[place].shape == copy.shape:
                state_dict[place] = copy.clone()


def _skips_itself(loaders: list[Any]) -> bool:
    """Whether the loaders continue where they were without being iterated."""
    if any(is_stateful(loader) for loader in loaders):
        return True  # what Lightning restored must not be moved
    return len(loaders) == 1 and skips_by_index(loaders[0])


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
    """This rank's random states in a checkpoint; on more ranks than it was saved on they repeat."""
    of_rank = saved.get("random_state_of_rank")
    if not of_rank:
        return None
    return RandomStates.unpack(saved["random_states"][of_rank[rank % len(of_rank)]])
