"""What Trainer and ranks share: sums, maxima and gathers over all ranks, and the wrapper that averages gradients.

Every rank must call the collectives, in the same order, whatever else the ranks do not share.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from lightning_lamb.lightning_seams import Trainer, data_parallel_size

Value = TypeVar("Value")


def sum_over_data_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Sums over the ranks that see different samples. One all-reduce, none on one rank.

    Args:
        trainer: the Trainer.
        values: any shape; may be overwritten.
    """
    if trainer.world_size == 1:
        return values
    # Ranks of one tensor-parallel group reported the same samples.
    return _reduced(trainer, values, "SUM") * (data_parallel_size(trainer) / trainer.world_size)


def largest_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """The largest of any rank, element by element. One all-reduce, none on one rank; ``values`` may be overwritten."""
    return values if trainer.world_size == 1 else _reduced(trainer, values, "MAX")


def gather_over_ranks(trainer: Trainer, value: Value) -> list[Value]:
    """Every rank's value (anything that can be pickled), on every rank. One collective, none on one rank."""
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return [value] * trainer.world_size
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def ddp_wrapper(trainer: Trainer) -> nn.Module | None:
    """The DistributedDataParallel around the module, if the strategy made one. Reads ``strategy.model``."""
    wrapper: nn.Module | None = trainer.strategy.model
    return wrapper if type(wrapper).__name__ == "DistributedDataParallel" else None


def _reduced(trainer: Trainer, values: Tensor, operation: str) -> Tensor:
    """``strategy.reduce`` is a barrier and an all-reduce: for where torch.distributed is not in use."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values
    reduced: Tensor = trainer.strategy.reduce(values, reduce_op=operation.lower())
    return reduced
