"""How LargeBatch's arguments, or a recipe, describe a training in stages."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

from lightning_lamb.callbacks.batch_stages import (
    BatchStage,
    StagedBatches,
    as_batch_stages,
    growing_stages,
    stages_of_recipe,
)
from lightning_lamb.callbacks.micro_batch import declared_micro_batch, micro_batch_of_loaders
from lightning_lamb.callbacks.rules import BatchRules, LRScaling
from lightning_lamb.callbacks.summary import DerivedBatch
from lightning_lamb.checks import whole_number
from lightning_lamb.errors import BatchSizeError, InvalidOptionError
from lightning_lamb.lightning_seams import Trainer, train_data_source
from lightning_lamb.recipes import recipe_named
from lightning_lamb.scaling import accumulate_grad_batches


@dataclasses.dataclass
class StageOptions:
    """What the user said about stages.

    Attributes:
        stages: as given; steps may still be shares.
        rules: what gives learning rates and warm-ups that a stage leaves out, at the first stage's batch.
        total_samples: the length that shares are of.
        micro_batch_sizes: one per stage, or one for all; empty: the data tells.
    """

    stages: tuple[BatchStage, ...]
    rules: BatchRules
    total_samples: int | None = None
    micro_batch_sizes: tuple[int, ...] = ()
    _data: tuple[Callable[[], Any], int] | None = dataclasses.field(default=None, compare=False)
    """Who makes the dataloader (a weak reference), and the micro-batch it told before a stage changed it."""

    @classmethod
    def of(
        cls,
        global_batch_size: int | None,
        base_batch_size: int | None,
        base_lr: float | None,
        warmup_fraction: float,
        warmup_steps: int | None,
        lr_scaling: str | None,
        recipe: str | None,
        stages: Sequence[Any] | None,
        doublings: int,
        total_samples: int | None,
        micro_batch_size: int | Sequence[int] | None,
    ) -> StageOptions | None:
        """The stages from LargeBatch's arguments; None for a training with one batch.

        Raises:
            InvalidOptionError: two descriptions of the stages, or options that have no effect.
            PlanError: the stages do not fit together.
        """
        rule = cast("LRScaling", lr_scaling or "sqrt")
        in_stages = recipe is not None and _changes_batch(recipe)
        _refuse_two_plans(global_batch_size, recipe if in_stages else None, stages, doublings, warmup_steps)
        if stages is not None:
            made = as_batch_stages(stages)
            rules = BatchRules(made[0].global_batch_size, base_batch_size, base_lr, warmup_fraction, None, rule)
        elif in_stages and recipe is not None:
            fraction = warmup_fraction or None
            made = stages_of_recipe(recipe, global_batch_size, base_batch_size, base_lr, fraction, lr_scaling)
            rules = BatchRules(made[0].global_batch_size)
        elif whole_number("doublings", doublings, at_least=0):
            rules = BatchRules.of(
                global_batch_size, base_batch_size, base_lr, warmup_fraction, warmup_steps, lr_scaling, recipe
            )
            made = growing_stages(rules.global_batch_size, doublings)
            made = (dataclasses.replace(made[0], warmup_steps=warmup_steps), *made[1:])
        else:
            _refuse_without_stages(total_samples, micro_batch_size)
            return None
        return cls(made, rules, total_samples, _micro_batches(micro_batch_size, len(made)))

    def plan(self, trainer: Trainer) -> StagedBatches:
        """The stages with their steps."""
        limit = None if trainer.max_steps == -1 else trainer.max_steps
        plan = StagedBatches.of(self.stages, self.rules, limit, self.total_samples)
        plan.schedule()  # refuses a warm-up that is too long
        return plan

    def _micro_batches(self, trainer: Trainer) -> list[int]:
        """The micro-batch of every stage: as given, else as the data says."""
        if self.micro_batch_sizes:
            return list(self.micro_batch_sizes) * (1 if len(self.micro_batch_sizes) > 1 else len(self.stages))
        given = [stage.micro_batch_size for stage in self.stages]
        if all(size is not None for size in given):
            return [size for size in given if size is not None]
        source = train_data_source(trainer)
        # Where stages write the data module's batch_size, a second fit would find what the last stage set.
        if self._data is None or self._data[0]() is not source or not any(given):
            told = declared_micro_batch(trainer) or micro_batch_of_loaders(trainer)
            self._data = (weakref.ref(source) if hasattr(source, "train_dataloader") else lambda: None, told)
        return [self._data[1] if size is None else size for size in given]

    def batches(self, trainer: Trainer, plan: StagedBatches, ranks: int) -> list[DerivedBatch]:
        """Shares every stage's batch out among ranks and accumulation.

        Args:
            trainer: after every ``setup``; its dataloader is made if nothing else tells the micro-batch.
            plan: the stages with their steps.
            ranks: that see different samples.

        Raises:
            BatchSizeError: one does not divide, or the micro-batch cannot change; the message shows the plan.
        """
        sizes = self._micro_batches(trainer)
        _refuse_fixed_micro_batch(trainer, sizes)
        found = []
        for index, (stage, size) in enumerate(zip(plan.stages, sizes, strict=True)):
            try:
                accumulation = accumulate_grad_batches(stage.global_batch_size, size, ranks)
            except BatchSizeError as error:
                raise BatchSizeError(f"stages[{index}]: {error}\n{plan.table()}") from None
            found.append(DerivedBatch(stage.global_batch_size, size, ranks, accumulation, total_steps=plan.total_steps))
        return found


def _refuse_fixed_micro_batch(trainer: Trainer, sizes: list[int]) -> None:
    """Refuses micro-batches that differ between the stages where nothing can change them."""
    source = train_data_source(trainer)
    if len(set(sizes)) == 1:
        return
    if not hasattr(source, "train_dataloader"):
        raise BatchSizeError(
            f"the stages have micro-batches of {sizes}, but fit was given a {type(source).__name__}, whose batch size "
            "cannot change. Give fit a LightningDataModule that reads self.batch_size in train_dataloader, or use one "
            "micro-batch size."
        )
    if not (hasattr(source, "batch_size") or "batch_size" in getattr(source, "hparams", {})):
        raise BatchSizeError(
            f"the stages have micro-batches of {sizes}, but {type(source).__name__} has no batch_size that could be "
            "set. Read self.batch_size in train_dataloader, or use one micro-batch size."
        )


def _changes_batch(recipe: str) -> bool:
    """Whether a recipe's batch or schedule changes during the training."""
    stages = recipe_named(recipe).stages
    return len({s.global_batch_size for s in stages}) > 1 or any(s.restarts_schedule for s in stages[1:])


def _micro_batches(given: int | Sequence[int] | None, number: int) -> tuple[int, ...]:
    """LargeBatch's micro_batch_size as one number per stage, or one for all."""
    if given is None:
        return ()
    sizes = [given] if isinstance(given, int) else list(given)
    if len(sizes) not in (1, number):
        raise InvalidOptionError(f"micro_batch_size={sizes} has {len(sizes)} numbers for {number} stages.")
    return tuple(whole_number("micro_batch_size", size) for size in sizes)


def _refuse_two_plans(
    global_batch_size: int | None, recipe: str | None, stages: Any, doublings: int, warmup_steps: int | None
) -> None:
    """Refuses what describes the stages twice."""
    given = [f"recipe={recipe!r}"] if recipe else []
    given += ["stages"] if stages is not None else []
    given += [f"doublings={doublings}"] if doublings else []
    if len(given) > 1:
        raise InvalidOptionError(f"{' and '.join(given)} all say which stages there are: give one of them.")
    if stages is not None and global_batch_size is not None:
        raise InvalidOptionError(
            f"global_batch_size={global_batch_size} and stages: each stage gives its own. Leave the former out."
        )
    if (stages is not None or recipe) and warmup_steps is not None:
        raise InvalidOptionError(f"warmup_steps={warmup_steps} and stages: give the warm-up of each stage in it.")


def _refuse_without_stages(total_samples: int | None, micro_batch_size: Any) -> None:
    """Refuses what has an effect in stages only."""
    if total_samples is not None:
        raise InvalidOptionError(f"total_samples={total_samples} has no effect without stages or doublings.")
    if micro_batch_size is not None and not isinstance(micro_batch_size, int):
        raise InvalidOptionError(f"micro_batch_size={micro_batch_size!r} must be one number without stages.")
