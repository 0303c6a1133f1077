"""`DeferredGradientSync`: one reduce-scatter per optimizer step under FSDP2, instead of one per micro-batch."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_lamb.errors import ConflictError
from lightning_lamb.lightning_seams import Callback, LightningModule, Trainer, closes_window


class DeferredGradientSync(Callback):
    """Keeps FSDP2 from communicating gradients while micro-batches are accumulated.

    Lightning does so under DDP and FSDP1. Under FSDP2 every micro-batch is reduce-scattered, so that gradients stay
    sharded. With this callback only the last one of a window is, and the gradient is the same up to the order of
    summation. What it costs: each rank holds the whole gradient between micro-batches, 4 bytes per parameter in float32
    (2 in bf16-true) instead of that divided by the number of ranks. Communication of weights stays as it is.

    Raises:
        ConflictError: there is no FSDP2 module (``fully_shard``), so there is nothing to defer; or an epoch ended
            inside a window.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a strategy that it would do nothing for."""
        if not list(_fsdp2_modules(pl_module)):
            raise ConflictError(
                f"DeferredGradientSync is for FSDP2, and {type(pl_module).__name__} has no module that fully_shard was "
                f"applied to (strategy: {type(trainer.strategy).__name__}). Under DDP and FSDP1 Lightning defers "
                "gradients itself: remove the callback."
            )

    def __init__(self) -> None:
        super().__init__()
        self._modules: list[Any] = []
        self._held = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the modules once."""
        self._modules, self._held = list(_fsdp2_modules(pl_module)), False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Communicates the gradients of this micro-batch only if an optimizer step follows it."""
        communicates = closes_window(trainer)
        for module in self._modules:
            module.set_requires_gradient_sync(communicates, recurse=False)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Refuses to go on where a window was left open: FSDP2 would add what it held to the next one."""
        if self._held:
            raise ConflictError(
                "DeferredGradientSync: an epoch ended inside a window (-1 from on_train_batch_start?), and FSDP2 holds "
                "its gradients where zero_grad does not reach: the next window would contain them. End epochs where a "
                "window ends, or remove DeferredGradientSync."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes whether gradients are held back."""
        self._held = bool(self._modules) and not closes_window(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the module as it was."""
        for module in self._modules:
            module.set_requires_gradient_sync(True, recurse=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same, where Lightning does not call `on_train_end`."""
        self.on_train_end(trainer, pl_module)


def _fsdp2_modules(module: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (part for part in module.modules() if isinstance(part, FSDPModule))
