"""Copies of a module's buffers (running statistics, say) as they were when the open window began."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lamb.sharding.annotate import clean_name

SMALL = 2**14
"""Elements up to which a buffer is copied without a look at whether it moved."""

VERSION = operator.attrgetter("_version")
"""Counts what PyTorch writes to a tensor."""


class WindowBuffers:
    """What a checkpoint from inside a window needs: the persistent buffers, copied in few calls, without a host sync.

    Large buffers are copied only where their version counter moved. Small ones always are: the kernels of batch norm
    move running statistics without counting, and so does who writes to ``buffer.data``.
    """

    def __init__(self) -> None:
        self._places: list[tuple[str, dict[str, Tensor | None]]] = []
        self._copies: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def find(self, module: nn.Module) -> None:
        """Looks for the buffers; again where modules may have been exchanged."""
        self._places = [
            (f"{path}.{name}" if path else name, vars(owner)["_buffers"])
            for path, owner in module.named_modules()
            for name in vars(owner)["_buffers"]
            if name not in vars(owner)["_non_persistent_buffers_set"]
        ]

    def keep(self) -> None:
        """Copies them, into the last copies where they fit."""
        if self._places:
            self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        sources, targets = [], []
        for path, buffers in self._places:
            buffer = buffers.get(path.rpartition(".")[2])
            if buffer is None:
                self._copies.pop(path, None)
                continue
            copy = self._copies.get(path)
            if copy is None or copy.shape != buffer.shape or copy.device != buffer.device or copy.dtype != buffer.dtype:
                self._copies[path] = buffer.detach().clone()
                self._has_moved(path, buffer)
            elif self._has_moved(path, buffer):
                sources.append(buffer.detach())
                targets.append(copy)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _has_moved(self, path: str, buffer: Tensor) -> bool:
        """Whether a buffer may have changed since it was last asked for."""
        if buffer.numel() <= SMALL or buffer.is_inference():
            return True
        before, self._versions[path] = self._versions.get(path), (id(buffer), VERSION(buffer))
        return before != self._versions[path]

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Puts the copies in the places of the buffers in a checkpoint.

        Lightning's WeightAveraging moves the model that trains to ``current_model_state`` and puts the average in its
        place, before or after: the order of callbacks does not matter.
        """
        state_dict = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
        places = {clean_name(name): name for name in state_dict}
        for name, copy in self._copies.items():
            place = places.get(clean_name(name))
            if place is not None and state_dict[place].shape == copy.shape:
                state_dict[place] = copy.clone()
