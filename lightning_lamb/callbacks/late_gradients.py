"""Gradients of layers that train only later: DDP never averages them, so LargeBatch does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_lamb.lightning_rank_seams import ddp_wrapper
from lightning_lamb.lightning_seams import Trainer


class LateGradients:
    """Averages over ranks the gradients of parameters that were frozen when DDP wrapped the module.

    DDP decides then which gradients it communicates. A layer that BackboneFinetuning unfreezes later is in no bucket:
    each rank would train it on its own samples, the ranks would drift apart, and the window's gradient would not be
    the mean over the global batch.

    Args:
        trainer: the Trainer, whose strategy has wrapped the module.
    """

    def __init__(self, trainer: Trainer) -> None:
        wrapper: Module | None = ddp_wrapper(trainer)
        self._frozen = [] if wrapper is None else [p for p in wrapper.parameters() if not p.requires_grad]

    @classmethod
    def of(cls, trainer: Trainer) -> LateGradients | None:
        """None where nothing was frozen when the module was wrapped."""
        found = cls(trainer)
        return found if found._frozen else None

    def average(self) -> None:
        """Averages what is unfrozen by now; call it on every rank before gradients are unscaled.

        One all-reduce per dtype and device of late layers; none as long as nothing was frozen, or all of it still is.
        """
        kinds: dict[tuple[torch.dtype, torch.device], list[Parameter]] = {}
        for parameter in self._frozen:
            if parameter.requires_grad:  # the same on all ranks: whether there is a gradient need not be
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in kinds.values():
            _average(parameters)


@torch.no_grad()
def _average(parameters: list[Parameter]) -> None:
    """Averages in one buffer, which also says for each parameter whether any rank has a gradient."""
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    used = parts[0].new_tensor([float(p.grad is not None) for p in parameters])
    buffer = torch.cat([*parts, used])
    dist.all_reduce(buffer)
    anyone: Tensor = buffer[-len(parameters) :]
    buffer = buffer / dist.get_world_size()
    first = 0
    for index, parameter in enumerate(parameters):
        mean = buffer[first : first + parameter.numel()].view_as(parameter)
        first += parameter.numel()
        if parameter.grad is not None:
            parameter.grad.copy_(mean)
        elif anyone[index] > 0:  # the host waits for the device only on a rank without a gradient
            parameter.grad = mean.clone()
