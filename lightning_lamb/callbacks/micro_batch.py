"""How many samples is one micro-batch? Read from the data, and compared with what the user said."""

from __future__ import annotations

from typing import Any

from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.errors import BatchSizeError
from lightning_lamb.lightning_seams import LightningModule, Trainer, load_train_data, train_data_source


def declared_micro_batch(trainer: Trainer, given: int | None) -> int | None:
    """The micro-batch that is known without making a dataloader.

    Args:
        trainer: after its data module's ``setup``.
        given: LargeBatch's own ``micro_batch_size``.

    Returns:
        ``given``, or ``batch_size`` of the data module (of the module, if that makes the loader) or of its
        hyper-parameters; None if none of them is there.

    Raises:
        BatchSizeError: the data module says something else than ``given``.
    """
    source = train_data_source(trainer)
    declared = getattr(source, "hparams", {}).get("batch_size") if hasattr(source, "train_dataloader") else None
    if declared is None and hasattr(source, "train_dataloader"):
        declared = getattr(source, "batch_size", None)
    declared = declared if isinstance(declared, int) else None
    if given is not None and declared is not None and given != declared:
        raise BatchSizeError(
            f"micro_batch_size={given}, but {type(source).__name__}.batch_size={declared}: the accumulation would be "
            "wrong. Make them equal, or leave micro_batch_size out to take the latter."
        )
    return given if given is not None else declared


def micro_batch_of_loaders(trainer: Trainer) -> int:
    """The micro-batch of the training dataloader, which is loaded for it.

    Raises:
        BatchSizeError: it does not tell, or there are several loaders that differ.
    """
    sizes = {loader_batch_size(loader) for loader in load_train_data(trainer)}
    if len(sizes) == 1 and None not in sizes:
        return int(next(iter(sizes)))  # type: ignore[arg-type]
    found = "several dataloaders of different sizes" if len(sizes) > 1 else "a dataloader without a batch_size"
    raise BatchSizeError(
        f"LargeBatch cannot tell the micro-batch size: training uses {found}. "
        "Give LargeBatch(micro_batch_size=...), the samples per forward pass and rank."
    )


def refuse_other_micro_batch(trainer: Trainer, micro_batch_size: int) -> None:
    """Compares the dataloader that training will use with the micro-batch that was planned with.

    Raises:
        BatchSizeError: it has another size. A loader that does not tell its size is trusted.
    """
    for loader in load_train_data(trainer):
        size = loader_batch_size(loader)
        if size is not None and size != micro_batch_size:
            raise BatchSizeError(
                f"LargeBatch planned with micro_batch_size={micro_batch_size}, but the training dataloader gives "
                f"batches of {size}: the global batch would be {size / micro_batch_size:g} times "
                "what was asked for. Make them equal."
            )


def refuse_short_epoch(batches: float, derived: DerivedBatch) -> None:
    """Compares a window with the epoch.

    Args:
        batches: micro-batches per epoch and rank.
        derived: the batch that was planned.

    Raises:
        BatchSizeError: the window is longer.
    """
    if batches < derived.accumulate_grad_batches:
        largest = int(batches) * derived.micro_batch_size * derived.data_parallel_size
        raise BatchSizeError(
            f"global_batch_size={derived.global_batch_size} needs {derived.accumulate_grad_batches} micro-batches per "
            f"optimizer step, but an epoch has {batches} per rank: a step would end with the epoch, on fewer samples. "
            f"Use a global batch of at most {largest}, or more data per epoch (limit_train_batches cuts it too)."
        )


def data_comes_from_module(trainer: Trainer) -> bool:
    """Whether the LightningModule itself makes the dataloader; then its ``setup`` must run first."""
    return isinstance(train_data_source(trainer), LightningModule)


def loader_batch_size(loader: Any) -> int | None:
    """The samples per batch of a dataloader, or None if it does not tell."""
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None
