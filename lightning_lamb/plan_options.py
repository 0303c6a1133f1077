"""How arguments, or a recipe, describe a training in stages: the same for the command line and for LargeBatch.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.batch_stages import BatchStage, as_batch_stages, growing_stages, stages_of_recipe
from lightning_lamb.checks import whole_number
from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.recipes import recipe_named
from lightning_lamb.scaling import LRScaling
from lightning_lamb.staged_batches import StagedBatches


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What the user said about stages.

    Attributes:
        stages: as given; steps may still be shares.
        rules: what gives learning rates and warm-ups that a stage leaves out, at the first stage's batch.
        total_samples: the length that shares are of.
        micro_batch_sizes: one per stage, or one for all; empty: the data tells.
        doublings: how often the batch doubles, if that is what made the stages.
    """

    stages: tuple[BatchStage, ...]
    rules: BatchRules
    total_samples: int | None = None
    micro_batch_sizes: tuple[int, ...] = ()
    doublings: int = 0

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
    ) -> PlanOptions | None:
        """The stages from LargeBatch's arguments; None for a training with one batch.

        Raises:
            InvalidOptionError: two descriptions of the stages, or options that have no effect.
            PlanError: the stages do not fit together.
        """
        rule_given = None if lr_scaling is None else cast("LRScaling", lr_scaling)
        rule = rule_given or "sqrt"
        in_stages = recipe is not None and _changes_batch(recipe)
        _refuse_two_plans(global_batch_size, recipe if in_stages else None, stages, doublings, warmup_steps)
        if stages is not None:
            made = as_batch_stages(stages)
            rules = BatchRules(made[0].global_batch_size, base_batch_size, base_lr, warmup_fraction, None, rule)
        elif in_stages and recipe is not None:
            fraction = warmup_fraction or None
            made = stages_of_recipe(
                recipe_named(recipe), global_batch_size, base_batch_size, base_lr, fraction, rule_given
            )
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
        return cls(made, rules, total_samples, _micro_batches(micro_batch_size, len(made)), doublings)

    def plan(self, max_steps: int | None) -> StagedBatches:
        """The stages with their steps.

        Args:
            max_steps: the Trainer's, None if it has none: the length of stages that are shares.

        Raises:
            PlanError: the length is unknown or too short, or a warm-up too long.
        """
        plan = StagedBatches.of(self.stages, self.rules, max_steps, self.total_samples)
        ramp = plan.schedule()[0].warmup_steps
        if self.doublings and ramp > plan.steps[0]:
            number = len(plan.stages)
            raise PlanError(
                f"warmup_fraction={plan.warmup_fraction(0):g} of the samples is longer than the first of {number} "
                f"equal stages. Use at most {1 / number:.4g}, or fewer doublings."
            )
        return plan


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
