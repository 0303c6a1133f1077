"""A plan: every number that follows from a global batch, for people (a table) and programs (a dict).

The ``python -m lightning_lamb plan`` command and the docs take their numbers from here; the steps, learning rates and
warm-ups in them are `lightning_lamb.staged_batches`', as LargeBatch's are. Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from lightning_lamb.batch_rules import BatchRules
from lightning_lamb.batch_stages import BatchStage, as_batch_stages, stages_of_recipe
from lightning_lamb.checks import one_of, whole_number
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.footprint import PRECISIONS, HeldBytes, SentBytes, held_bytes, sent_bytes
from lightning_lamb.plan_options import PlanOptions
from lightning_lamb.plan_table import plan_table
from lightning_lamb.recipes import Recipe, recipe_named
from lightning_lamb.scaling import LastWindow, LRScaling, steps_of_epochs
from lightning_lamb.stage_plans import StagePlan, stage_plans
from lightning_lamb.staged_batches import StagedBatches
from lightning_lamb.stages import Stage

__all__ = ["Plan", "StagePlan", "make_plan", "plan_from_recipe"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole training: its stages, its schedule, and what a rank must hold and send.

    Attributes:
        title: One line for people.
        stages: The parts of the training, in order.
        schedule: The stages of the learning rate: one per start of a schedule.
        lr_scaling: Rule that the learning rates were scaled by.
        recipe: Name of the recipe, or None.
        parameters: The model's parameters, or None.
        layers: Tensors that get a trust ratio, or None.
        precision: Lightning's name of the precision that memory was estimated for.
        memory_per_rank: Per strategy, what one rank holds; None without a model size.
        sources: Where the numbers come from, by name.
    """

    title: str
    stages: tuple[StagePlan, ...]
    schedule: tuple[Stage, ...]
    lr_scaling: LRScaling
    recipe: str | None = None
    parameters: int | None = None
    layers: int | None = None
    precision: str = "32-true"
    memory_per_rank: Mapping[str, HeldBytes] | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps over all stages."""
        return sum(stage.total_steps for stage in self.stages)

    @property
    def lr(self) -> float:
        """Peak learning rate of the first stage."""
        return self.stages[0].lr

    @property
    def warmup_steps(self) -> int:
        """Warm-up of the first schedule, in optimizer steps."""
        return self.schedule[0].warmup_steps

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches per rank and optimizer step in the first stage."""
        return self.stages[0].accumulate_grad_batches

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step in the first stage."""
        return self.stages[0].global_batch_size

    def schedule_stages(self) -> list[Stage]:
        """Return the stages of the learning rate, for StagedWarmup: one per start of a schedule.

        Example:
            >>> plan = plan_from_recipe("bert-large-mixed", micro_batch_size=32, data_parallel_size=128)
            >>> [(stage.steps, stage.warmup_steps, round(stage.lr, 5)) for stage in plan.schedule_stages()]
            [(7037, 2815, 0.00707), (1562, 312, 0.005)]
        """
        return list(self.schedule)

    def table(self) -> str:
        """Return the plan as text for people."""
        return plan_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-able numbers, strings, lists and dicts; ``stages`` is always a list."""
        return {
            "recipe": self.recipe,
            "title": self.title,
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "global_batch_size": self.global_batch_size,
            "micro_batch_size": self.stages[0].micro_batch_size,
            "data_parallel_size": self.stages[0].data_parallel_size,
            "warmup_fraction": self.stages[0].warmup_fraction,
            "samples": sum(stage.samples for stage in self.stages),
            "lr_scaling": self.lr_scaling,
            "stages": [_as_dict(stage) for stage in self.stages],
            "schedule": [dataclasses.asdict(stage) for stage in self.schedule],
            "parameters": self.parameters,
            "layers": self.layers,
            "precision": self.precision,
            "memory_per_rank": _as_dict(self.memory_per_rank),
            "sources": dict(self.sources),
        }


def make_plan(
    *,
    micro_batch_size: int | Sequence[int],
    data_parallel_size: int,
    base_lr: float,
    global_batch_size: int | None = None,
    base_batch_size: int | None = None,
    warmup_fraction: float = 0.0,
    warmup_steps: int | None = None,
    dataset_size: int | None = None,
    epochs: float | None = None,
    total_steps: int | None = None,
    lr_scaling: LRScaling = "sqrt",
    last_window: LastWindow = "carry",
    stages: Sequence[BatchStage] | Sequence[Mapping[str, Any]] | None = None,
    doublings: int = 0,
    parameters: int | None = None,
    layers: int | None = None,
    precision: str = "32-true",
) -> Plan:
    """Plan a training from a learning rate and warm-up that are good at some batch.

    Args:
        micro_batch_size: Samples per rank and forward pass; one number, or one per stage.
        data_parallel_size: Ranks that see different samples; under tensor parallelism not the world size.
        base_lr: Learning rate at ``base_batch_size``.
        global_batch_size: Samples per optimizer step, over all ranks. Required, unless there are stages.
        base_batch_size: Batch that ``base_lr`` and ``warmup_fraction`` belong to; None: that of the (first) stage.
        warmup_fraction: Warm-up at that batch, as a share of the samples; grows with the batch.
        warmup_steps: Warm-up in optimizer steps, instead.
        dataset_size: Samples per epoch; together with ``epochs``.
        epochs: Passes over the data.
        total_steps: Optimizer steps (with doublings: as many as there were at ``global_batch_size``), instead of
            ``dataset_size`` and ``epochs``.
        lr_scaling: ``"sqrt"`` (the paper's), ``"linear"`` or ``"none"``.
        last_window: ``"carry"``, ``"keep"`` (as Lightning and LargeBatch train) or ``"drop"``: see
            :func:`lightning_lamb.scaling.steps_of_epochs`.
        stages: A training in stages, as for LargeBatch: a list of BatchStage or of dicts of its fields.
        doublings: 0, or how often the batch doubles during the training while the learning rate stays constant after
            the warm-up (Smith et al., "Don't decay the learning rate, increase the batch size", arXiv 1711.00489):
            ``doublings + 1`` stages that see the same number of samples.
        parameters: The model's parameter count, for memory and traffic.
        layers: Tensors that get a trust ratio (at least two dimensions), for traffic.
        precision: Lightning's name: 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true.

    Raises:
        InvalidOptionError: A value is out of range, or the length is given in no way or in two.
        BatchSizeError: The global batch does not divide, or is larger than the dataset.
        PlanError: The warm-up is longer than the training.

    Example:
        >>> plan = make_plan(
        ...     global_batch_size=4096, micro_batch_size=64, data_parallel_size=8, base_lr=1e-3, base_batch_size=1024,
        ...     warmup_fraction=0.05, dataset_size=1_000_000, epochs=10,
        ... )
        >>> plan.lr, plan.warmup_steps, plan.total_steps, plan.accumulate_grad_batches
        (0.002, 488, 2442, 8)
    """
    length = _Length(dataset_size, epochs, total_steps, last_window)
    made = None if stages is None else as_batch_stages(stages)
    base = base_batch_size or (global_batch_size if made is None else made[0].global_batch_size)
    given = (global_batch_size, base, base_lr, warmup_fraction, warmup_steps, lr_scaling, None)
    samples = length.samples(global_batch_size or 1) if doublings else length.samples_of_shares(made)
    options = PlanOptions.of(*given, made, doublings, samples, None)
    if options is not None:
        planned = options.plan(total_steps if made is not None else None)
    else:
        rules = BatchRules.of(*given)
        steps = length.steps(rules.global_batch_size)
        rules.warmup(steps)  # refuses one that is too long
        planned = StagedBatches((BatchStage(rules.global_batch_size, steps, warmup_steps=warmup_steps),), rules)
    plan = _plan_of(planned, micro_batch_size, data_parallel_size, "own plan", lr_scaling)
    return _with_footprint(plan, parameters, layers, precision)


def plan_from_recipe(
    recipe: str | Recipe,
    *,
    micro_batch_size: int | Sequence[int],
    data_parallel_size: int,
    global_batch_size: int | None = None,
    base_lr: float | None = None,
    base_batch_size: int | None = None,
    warmup_fraction: float | None = None,
    lr_scaling: LRScaling | None = None,
    precision: str = "32-true",
) -> Plan:
    """Plan one of the paper's trainings at any batch size and on any number of ranks.

    Args:
        recipe: A name in :data:`lightning_lamb.recipes.RECIPES`, or a recipe of your own.
        micro_batch_size: Samples per rank and forward pass; one number, or one per stage.
        data_parallel_size: Ranks that see different samples; under tensor parallelism not the world size.
        global_batch_size: Samples per optimizer step in the first stage; the other stages keep their ratio to it.
            None: the paper's.
        base_lr: Learning rate at ``base_batch_size``, instead of the recipe's.
        base_batch_size: Batch that ``base_lr`` and ``warmup_fraction`` belong to; None: the recipe's.
        warmup_fraction: Warm-up at that batch, instead of the recipe's.
        lr_scaling: ``"sqrt"``, ``"linear"`` or ``"none"``; None: the recipe's, which is ``"sqrt"``.
        precision: Lightning's name: 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true.

    Raises:
        InvalidOptionError: A value is out of range, the recipe is unknown, or has no learning rate and none is given.
        BatchSizeError: The global batch of a stage does not divide.
        PlanError: The warm-up is longer than the training.

    Example:
        >>> plan = plan_from_recipe(
        ...     "bert-large", global_batch_size=32768, micro_batch_size=32, data_parallel_size=128
        ... )
        >>> plan.lr, plan.warmup_steps, plan.total_steps, plan.accumulate_grad_batches
        (0.005, 3125, 15625, 8)
    """
    chosen = recipe if isinstance(recipe, Recipe) else recipe_named(recipe)
    stages = stages_of_recipe(chosen, global_batch_size, base_batch_size, base_lr, warmup_fraction, lr_scaling)
    given = {"base_lr": base_lr, "base_batch_size": base_batch_size, "warmup_fraction": warmup_fraction}
    planned = StagedBatches(stages, BatchRules(stages[0].global_batch_size))
    rule = chosen.lr_scaling if lr_scaling is None else lr_scaling
    plan = _plan_of(planned, micro_batch_size, data_parallel_size, chosen.title, rule)
    plan = dataclasses.replace(
        plan,
        recipe=chosen.name,
        sources={**chosen.sources, **{name: "given by you" for name, value in given.items() if value is not None}},
    )
    return _with_footprint(plan, chosen.parameters, chosen.layers, precision)


def _plan_of(
    planned: StagedBatches,
    micro_batch_size: int | Sequence[int],
    data_parallel_size: int,
    title: str,
    lr_scaling: LRScaling,
) -> Plan:
    """The plan for so many ranks and that micro-batch."""
    stages = stage_plans(planned, micro_batch_size, data_parallel_size)
    return Plan(title=title, stages=stages, schedule=tuple(planned.schedule()), lr_scaling=lr_scaling)


@dataclasses.dataclass(frozen=True)
class _Length:
    """How long a training is: in samples, as epochs of a dataset; or in optimizer steps."""

    dataset_size: int | None
    epochs: float | None
    total_steps: int | None
    last_window: LastWindow

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            if self.dataset_size is not None or self.epochs is not None:
                raise InvalidOptionError(
                    f"total_steps={self.total_steps} and dataset_size={self.dataset_size}, epochs={self.epochs} both "
                    "set the length of the training. Give total_steps alone, or dataset_size and epochs."
                )
            whole_number("total_steps", self.total_steps)

    def steps(self, batch: int) -> int:
        """Optimizer steps at one batch."""
        if self.total_steps is not None:
            return self.total_steps
        if self.dataset_size is None or self.epochs is None:
            missing = " and ".join(name for name in ("dataset_size", "epochs") if getattr(self, name) is None)
            raise InvalidOptionError(
                f"The length of the training is unknown: {missing} not given. Give dataset_size and epochs, or "
                "total_steps."
            )
        return steps_of_epochs(self.dataset_size, self.epochs, batch, last_window=self.last_window)

    def samples(self, batch: int) -> int:
        """Samples of a training whose batch grows from this one."""
        steps = self.steps(batch)
        if self.total_steps is None and self.last_window == "carry":
            return math.ceil(Fraction(repr(float(self.epochs or 0))) * (self.dataset_size or 0))
        return steps * batch

    def samples_of_shares(self, stages: Sequence[BatchStage] | None) -> int | None:
        """Samples that stages share, None if they have a length in steps."""
        if stages is None or self.total_steps is not None:
            return None
        if stages[0].share is None and self.dataset_size is None and self.epochs is None:
            return None
        return self.samples(1)


def _with_footprint(plan: Plan, parameters: int | None, layers: int | None, precision: str) -> Plan:
    """Add what a rank holds (if the parameter count is known) and sends (if the layers are known too)."""
    one_of("precision", precision, PRECISIONS)
    if parameters is None:
        if layers is not None:
            raise InvalidOptionError(f"layers={layers} needs parameters, the model's parameter count, beside it.")
        return dataclasses.replace(plan, precision=precision)
    held = held_bytes(parameters, plan.stages[0].data_parallel_size, precision)
    stages = plan.stages
    if layers is not None:
        stages = tuple(
            dataclasses.replace(
                stage,
                bytes_sent_per_step=sent_bytes(
                    parameters, layers, stage.data_parallel_size, stage.accumulate_grad_batches, precision
                ),
            )
            for stage in stages
        )
    return dataclasses.replace(
        plan, stages=stages, parameters=parameters, layers=layers, precision=precision, memory_per_rank=held
    )


def _as_dict(value: Any) -> Any:
    """Turn nested dataclasses into dicts, with the totals that HeldBytes and SentBytes compute."""
    if isinstance(value, (HeldBytes, SentBytes)):
        return {**dataclasses.asdict(value), "total": value.total}
    if isinstance(value, StagePlan):
        fields = {field.name: _as_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {**fields, "samples": value.samples}
    if isinstance(value, Mapping):
        return {name: _as_dict(entry) for name, entry in value.items()}
    return value
