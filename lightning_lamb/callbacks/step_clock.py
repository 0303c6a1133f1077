"""The one clock of a training: optimizer steps really taken. A GradScaler skips some, which Lightning counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lamb.lightning_seams import Trainer, limit_training, rank_zero_warn
from lightning_lamb.step_hooks import after_each_step

MOST_SKIPPED_IN_A_ROW = 100
"""After so many skipped steps a training is not made longer any more: its gradients overflow at every scale."""


class StepClock:
    """Counts skipped optimizer steps, of one ``fit`` and of the checkpoint that it continues.

    No communication: under a GradScaler, ShardedGradScaler and DeepSpeed all ranks skip together.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Steps that the Trainer counts and the optimizer did not take."""
        self._in_a_row = 0
        self._taken = 0
        self._seen: int | None = None
        self._hooks: list[RemovableHandle] = []

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Counts the steps of these optimizers from now on, if torch reports the steps of all of them."""
        self.forget()
        hooks = [after_each_step(optimizer, self._count) for optimizer in optimizers]
        self._hooks = [hook for hook in hooks if hook is not None]
        if len(self._hooks) < len(hooks):
            self.forget()

    def forget(self) -> None:
        """Leaves the optimizers alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def stop(self, trainer: Trainer, total_steps: int | None) -> None:
        """Leaves optimizers and Trainer as they were, when a ``fit`` ends or fails.

        Args:
            trainer: gets the length back that skipped steps have made longer.
            total_steps: of a training in stages.
        """
        self.forget()
        if total_steps is not None and self.skipped:
            limit_training(trainer, total_steps)

    def steps(self, trainer: Trainer) -> int:
        """Optimizer steps really taken since the training's first."""
        return trainer.global_step - self.skipped

    def start(self, trainer: Trainer) -> None:
        """Begins to compare, after a checkpoint was restored; steps that nobody reports count as taken."""
        self._seen, self._taken = trainer.global_step if self._hooks else None, 0

    def end_micro_batch(self, trainer: Trainer, total_steps: int | None) -> None:
        """Notes whether the optimizer took the step that the Trainer counted, if it counted one.

        Args:
            trainer: made longer by every skipped step, so that every stage gets all its steps.
            total_steps: of a training in stages; None: the Trainer's length stays.
        """
        if self._seen is None or trainer.global_step == self._seen:
            return
        missing = trainer.global_step - self._seen - self._taken
        self._seen, self._taken = trainer.global_step, 0
        self._in_a_row = self._in_a_row + missing if missing > 0 else 0
        if missing <= 0:
            return
        self.skipped += missing
        if total_steps is not None and self._in_a_row <= MOST_SKIPPED_IN_A_ROW:
            limit_training(trainer, total_steps + self.skipped)
        elif total_steps is not None and self._in_a_row - missing <= MOST_SKIPPED_IN_A_ROW:
            rank_zero_warn(
                f"LargeBatch: the optimizer skipped {self._in_a_row} steps in a row, because gradients are not finite: "
                "the training is not made longer for them any more. Look for what overflows, or lower the learning "
                "rate."
            )

    def _count(self, optimizer: Any) -> None:
        if not getattr(optimizer, "step_was_skipped", False):
            self._taken += 1
