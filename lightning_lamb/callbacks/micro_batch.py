"""How many samples is one micro-batch? What the user says, or what the data says; then compared with the loaders."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from lightning_lamb.errors import BatchSizeError
from lightning_lamb.lightning_data_seams import combines_in_turn, loaders_in_sight, make_train_loaders
from lightning_lamb.lightning_seams import Trainer, train_data_source


def declared_micro_batch(trainer: Trainer) -> int | None:
    """The micro-batch that data module or module declare, before a dataloader exists.

    Args:
        trainer: after every ``setup``, which may still change what is declared.

    Returns:
        ``batch_size`` of whoever makes the loader, as attribute or hyper-parameter. None if there is neither, if they
        differ, or if the loaders exist already: then these tell.

    Raises:
        BatchSizeError: it is no number of samples.
    """
    if loaders_in_sight(trainer) is not None:
        return None
    source = train_data_source(trainer)
    hparams = getattr(source, "hparams", {})
    found = [getattr(source, "batch_size", None), hparams.get("batch_size") if hasattr(hparams, "get") else None]
    numbers = {size for size in map(_whole, found) if size is not None}
    if len(numbers) != 1:
        return None
    size = numbers.pop()
    if size < 1:
        raise BatchSizeError(f"{type(source).__name__}.batch_size={size} is no micro-batch: it must be at least 1.")
    return size


def told_micro_batch(trainer: Trainer, *, make_loaders: bool) -> int | None:
    """The micro-batch as the data tells it: declared, or that of the training dataloaders.

    Args:
        trainer: after every ``setup``.
        make_loaders: make dataloaders for it, where they do not exist yet; on every rank, because Lightning waits.

    Returns:
        None if the dataloaders would tell and are not made.

    Raises:
        BatchSizeError: they do not tell, or they differ.
    """
    declared = declared_micro_batch(trainer)
    if declared is not None:
        return declared
    loaders = loaders_in_sight(trainer)
    _refuse_loaders_in_turn(trainer)
    if loaders is None and not make_loaders:
        return None
    sizes = [loader_batch_size(loader) for loader in (make_train_loaders(trainer) if loaders is None else loaders)]
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) and len(set(known)) == 1:
        return known[0]
    if len(known) < len(sizes) or not known:
        raise BatchSizeError(
            "LargeBatch cannot tell the micro-batch size: training uses a dataloader without a batch_size. "
            "Give LargeBatch(micro_batch_size=...), the samples per forward pass and rank."
        )
    raise BatchSizeError(
        f"LargeBatch cannot tell the micro-batch size: training uses several dataloaders of different sizes, {known}. "
        f"Say which samples count: LargeBatch(micro_batch_size=...) with {_choices(known)}."
    )


def refuse_other_micro_batch(trainer: Trainer, micro_batch_size: int, told_by: str) -> None:
    """Compares the dataloaders that training will use with the micro-batch that was planned with.

    Args:
        trainer: loaders that do not exist yet are not made for it.
        micro_batch_size: samples per forward pass and rank, as planned.
        told_by: where that number is from, e.g. "LargeBatch(micro_batch_size=8)" or "Data.batch_size".

    Raises:
        BatchSizeError: they have another size. A loader that does not tell is trusted here; what arrives is counted.
    """
    sizes = [loader_batch_size(loader) for loader in loaders_in_sight(trainer) or []]
    known = [size for size in sizes if size is not None]
    _refuse_loaders_in_turn(trainer)
    if not known or set(known) == {micro_batch_size}:
        return
    if len(sizes) == 1:
        raise BatchSizeError(
            f"LargeBatch planned with micro_batch_size={micro_batch_size} ({told_by}), but the training dataloader "
            f"gives batches of {known[0]}: the global batch would be {known[0] / micro_batch_size:g} times what was "
            f"asked for. Give LargeBatch(micro_batch_size={known[0]}), which wins over everything else, or make the "
            f"dataloader give {micro_batch_size}."
        )
    if len(known) == len(sizes) and micro_batch_size not in counted_sizes(known):
        raise BatchSizeError(
            f"LargeBatch planned with micro_batch_size={micro_batch_size} ({told_by}), but the training dataloaders "
            f"give batches of {known}. Say which samples count: LargeBatch(micro_batch_size=...) with "
            f"{_choices(known)}."
        )


def refuse_changed_loader(trainer: Trainer, micro_batch_size: int) -> None:
    """Refuses a loader that was made anew with another batch size, at the start of an epoch.

    Raises:
        BatchSizeError: the accumulation would be wrong from here on.
    """
    sizes = [loader_batch_size(loader) for loader in loaders_in_sight(trainer) or []]
    known = [size for size in sizes if size is not None]
    if known and micro_batch_size not in counted_sizes(known):
        every = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        raise BatchSizeError(
            f"the training dataloader of epoch {trainer.current_epoch} gives batches of "
            f"{known[0] if len(known) == 1 else known}, and those before gave {micro_batch_size} "
            f"(Trainer(reload_dataloaders_every_n_epochs={every})): LargeBatch accumulates for one micro-batch size. "
            "Keep it, or let the batch change at exact steps: LargeBatch(stages=[...]), each with its micro_batch_size."
        )


def loader_batch_size(loader: Any) -> int | None:
    """The samples per batch of a dataloader, or None if it does not tell."""
    size = _whole(getattr(loader, "batch_size", None))
    return _whole(getattr(getattr(loader, "batch_sampler", None), "batch_size", None)) if size is None else size


def counted_sizes(sizes: Sequence[int]) -> list[int]:
    """What may be called the micro-batch of several loaders at once: the size of one of them, or the sum of all."""
    return sorted({*sizes, sum(sizes)})


def _choices(sizes: Sequence[int]) -> str:
    """Those numbers, for a message."""
    each = ", ".join(str(size) for size in sorted(set(sizes)))
    return f"{each} (that loader's samples) or {sum(sizes)} (all)"


def _refuse_loaders_in_turn(trainer: Trainer) -> None:
    """Refuses what Lightning's ``fit`` does not take, before advising on its batch sizes."""
    if combines_in_turn(trainer):
        raise BatchSizeError(
            "CombinedLoader(mode='sequential') cannot be trained on: Lightning's fit takes 'min_size', 'max_size' and "
            "'max_size_cycle'. To use datasets one after the other, join them: torch.utils.data.ConcatDataset."
        )


def _whole(value: Any) -> int | None:
    """A whole number of any kind (Python's, numpy's), or None."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of several numbers
        return None
