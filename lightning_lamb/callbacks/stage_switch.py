"""What a stage changes in the Trainer and in the data module, and what is refused before the first one starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lamb.batch_stages import BatchStage
from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.lightning_seams import (
    LightningModule,
    Trainer,
    drop_data,
    limit_training,
    train_data_source,
)
from lightning_lamb.staged_batches import StagedBatches

DEFAULT_MAX_EPOCHS = (None, -1, 1000)
"""What Lightning makes of a Trainer that was not told how many epochs."""

LENGTH_OPTIONS = ("sequence_length", "seq_len", "seq_length", "max_length", "max_seq_length", "block_size")
"""Names of a data module's option that says how many tokens a sample has."""


def fit_length(trainer: Trainer, plan: StagedBatches) -> None:
    """Makes the Trainer train exactly as long as the plan.

    Raises:
        PlanError: it was told another length; the message shows the plan.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_steps not in (-1, plan.total_steps):
        raise PlanError(
            f"Trainer(max_steps={trainer.max_steps}), but the stages add up to {plan.total_steps} optimizer steps "
            f"({plan.total_steps - trainer.max_steps:+d}). Leave max_steps out, or change the stages:\n{plan.table()}"
        )
    if trainer.max_epochs not in DEFAULT_MAX_EPOCHS:
        raise PlanError(
            f"Trainer(max_epochs={trainer.max_epochs}), but the stages say how long to train, and a stage begins a new "
            f"epoch. Leave max_epochs out:\n{plan.table()}"
        )
    limit_training(trainer, plan.total_steps)


def refuse_impossible_data(trainer: Trainer, module: LightningModule, plan: StagedBatches) -> None:
    """Looks for what would fail in a later stage: options that the data module lacks, sequences that are too long.

    Also asks ``check_stage(stage)`` of the data module and of the module, where they have it.

    Raises:
        InvalidOptionError: naming the stage, the option and what there is.
    """
    source = train_data_source(trainer)
    for index, stage in enumerate(plan.stages):
        for name in stage.data:
            if not hasattr(source, "train_dataloader"):
                raise InvalidOptionError(
                    f"stages[{index}].data={stage.data!r}: training uses a dataloader that was handed to fit, which "
                    "cannot change. Give fit a LightningDataModule that makes it in train_dataloader."
                )
            if not has_option(source, name):
                raise InvalidOptionError(
                    f"stages[{index}].data: {type(source).__name__} has no attribute or hyper-parameter {name!r}. "
                    f"It has: {', '.join(_options(source)) or 'none'}. Set self.{name} in its __init__ and read it in "
                    f"train_dataloader.\n{plan.table()}"
                )
            if name in LENGTH_OPTIONS:
                _refuse_long_sequences(module, index, name, stage.data[name])
        for owner in {id(source): source, id(module): module}.values():  # a module may make its own dataloader
            check = getattr(owner, "check_stage", None)
            if callable(check):
                check(stage)


def _refuse_long_sequences(module: nn.Module, index: int, name: str, length: Any) -> None:
    """Compares with ``config.max_position_embeddings``, which transformers' models have."""
    for path, part in module.named_modules():
        limit = getattr(getattr(part, "config", None), "max_position_embeddings", None)
        if isinstance(limit, int) and isinstance(length, int) and length > limit:
            raise InvalidOptionError(
                f"stages[{index}].data: {name}={length}, but {path or type(part).__name__} has positions for at most "
                f"max_position_embeddings={limit}. Shorten the sequences, or build the model with more positions."
            )


def has_option(source: Any, name: str) -> bool:
    """Whether a data module has an attribute or hyper-parameter of that name."""
    return hasattr(source, name) or name in getattr(source, "hparams", {})


def _options(source: Any) -> Iterator[str]:
    """What of a data module may be meant, for a message."""
    inherited = {"allow_zero_length_dataloader_with_multiple_devices", "prepare_data_per_node", "trainer"}
    names = {name for name in vars(source) if not name.startswith("_")} | set(getattr(source, "hparams", {}))
    return iter(sorted(names - inherited))


def set_option(source: Any, name: str, value: Any) -> None:
    """Sets an attribute of a data module, or its hyper-parameter, or both where it has both.

    Raises:
        InvalidOptionError: it cannot be set.
    """
    if name in getattr(source, "hparams", {}):
        source.hparams[name] = value
    if hasattr(source, name):
        try:
            setattr(source, name, value)
        except AttributeError as error:
            raise InvalidOptionError(
                f"{type(source).__name__}.{name} cannot be set to {value!r}, which a stage asks for: {error}. Give the "
                "property a setter."
            ) from error


def apply_stage(trainer: Trainer, stage: BatchStage, micro_batch_size: int) -> None:
    """Sets what a stage asks of the data, before its dataloader is made.

    Args:
        trainer: its data module, or the module that makes the dataloader, is changed.
        stage: the stage that begins.
        micro_batch_size: written to ``batch_size``, where there is such an attribute or hyper-parameter.
    """
    source = train_data_source(trainer)
    if not hasattr(source, "train_dataloader"):
        return
    if has_option(source, "batch_size"):
        set_option(source, "batch_size", micro_batch_size)
    for name, value in stage.data.items():
        set_option(source, name, value)


def reload_data(trainer: Trainer, stage: BatchStage) -> None:
    """Has the Trainer ask for the dataloaders anew; for validation only if the stage changes the data."""
    drop_data(trainer, validation=bool(stage.data))
