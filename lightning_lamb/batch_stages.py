"""The stages of a training, each with its own batch, data and learning rate: given, of a recipe, or a growing batch.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_lamb.checks import did_you_mean, finite_number, whole_number
from lightning_lamb.errors import BatchSizeError, InvalidOptionError, PlanError
from lightning_lamb.recipes import Recipe
from lightning_lamb.scaling import LRScaling, scaled_lr, scaled_warmup_fraction, steps_of_samples
from lightning_lamb.stages import DecayFrom, Shape, Stage


@dataclasses.dataclass(frozen=True)
class BatchStage:
    """One stage of a training.

    Args:
        global_batch_size: Samples per optimizer step, over all ranks.
        steps: Optimizer steps of the stage.
        share: Share of the training's samples that the stage sees, instead of steps; in all stages or in none.
        micro_batch_size: Samples per forward pass and rank. None: LargeBatch's, or the data module's batch_size.
        data: Attributes (or hyper-parameters) of the data module that are set before its train_dataloader is called
            for the stage, e.g. {"sequence_length": 128}.
        lr: Peak learning rate. None: base_lr (or the optimizer's own) scaled from base_batch_size to this batch.
        warmup_steps: Optimizer steps of warm-up from zero.
        warmup_fraction: Warm-up as a share of the samples up to the next stage that warms up, instead. Neither:
            LargeBatch's warmup_fraction, scaled from base_batch_size to this batch.
        power: Exponent of the polynomial decay.
        shape: "poly", "cosine" or "constant".
        decay_from: "start" or "peak" of the stage; see lightning_lamb.stages.Stage.
        end: Share of the peak that the decay ends at.
        restarts_schedule: The learning rate warms up again. False: the schedule of the stage before runs on over this
            one, which then has no lr, warm-up or decay of its own.
    """

    global_batch_size: int
    steps: int | None = None
    share: float | None = None
    micro_batch_size: int | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float | None = None
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    power: float = 1.0
    shape: Shape = "poly"
    decay_from: DecayFrom = "start"
    end: float = 0.0
    restarts_schedule: bool = True

    def __post_init__(self) -> None:
        """Checks every value by itself."""
        whole_number("global_batch_size", self.global_batch_size)
        if (self.steps is None) == (self.share is None):
            raise InvalidOptionError(f"steps={self.steps} and share={self.share}: give one of them.")
        if self.steps is not None:
            whole_number("steps", self.steps)
        if self.share is not None:
            finite_number("share", self.share, above=0.0, at_most=1.0)
        if self.micro_batch_size is not None:
            whole_number("micro_batch_size", self.micro_batch_size)
        data: Any = self.data  # YAML may hold anything
        if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
            raise InvalidOptionError(f"data={self.data!r} must be a dict of the data module's attributes.")
        if self.warmup_fraction is not None:
            finite_number("warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0)
            if self.warmup_steps is not None:
                raise InvalidOptionError(
                    f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction} both set the "
                    "warm-up: give one."
                )
        ramp = whole_number("warmup_steps", self.warmup_steps or 0, at_least=0)
        Stage(max(ramp, self.steps or 1), ramp, self.lr, 1.0, self.power, self.shape, self.decay_from, self.end)
        if self.steps is not None and ramp > self.steps:
            raise PlanError(f"warmup_steps={ramp} is above the stage's steps={self.steps}.")
        if not self.restarts_schedule:
            self._refuse_schedule()

    def _refuse_schedule(self) -> None:
        """Refuses what has no effect where the schedule of the stage before runs on."""
        for field in dataclasses.fields(self):
            ignored = field.name in ("lr", "warmup_steps", "warmup_fraction", "power", "shape", "decay_from", "end")
            if ignored and getattr(self, field.name) != field.default:
                raise InvalidOptionError(
                    f"{field.name}={getattr(self, field.name)!r} has no effect with restarts_schedule=False: the "
                    "schedule of the stage before runs on. Leave it out, or set it there."
                )


def as_batch_stages(stages: Sequence[BatchStage | Mapping[str, Any]]) -> tuple[BatchStage, ...]:
    """Turns what YAML and the command line give into checked stages.

    Raises:
        InvalidOptionError: not a list, an unknown or missing key, or a value out of range.
        PlanError: no stage, shares and steps mixed, or shares that are not 1 in all.
    """
    if isinstance(stages, (str, bytes, Mapping)) or not isinstance(stages, Sequence):
        raise InvalidOptionError(f"stages={stages!r} must be a list of stages, each a BatchStage or a dict.")
    if not stages:
        raise PlanError("stages=[] has no stage: give at least one, or leave it out.")
    made = tuple(_as_batch_stage(index, stage) for index, stage in enumerate(stages))
    if not made[0].restarts_schedule:
        raise PlanError("stages[0]: restarts_schedule=False, but there is no schedule before it that could run on.")
    shares = [stage.share for stage in made]
    if any(share is None for share in shares) and any(share is not None for share in shares):
        raise PlanError(f"some stages have a share and some have steps (shares: {shares}): give one kind in all.")
    if shares[0] is not None and not math.isclose(sum(filter(None, shares)), 1.0, abs_tol=1e-6):
        raise PlanError(f"the shares {shares} add up to {sum(filter(None, shares)):g}, not to 1.")
    return made


def _as_batch_stage(index: int, stage: BatchStage | Mapping[str, Any]) -> BatchStage:
    if isinstance(stage, BatchStage):
        return stage
    if not isinstance(stage, Mapping):
        raise InvalidOptionError(f"stages[{index}]={stage!r} must be a BatchStage or a dict of its fields.")
    known = [field.name for field in dataclasses.fields(BatchStage)]
    for key in stage:
        if key not in known:
            raise InvalidOptionError(
                f"stages[{index}]: unknown key {key!r}.{did_you_mean(str(key), known)} Known: {', '.join(known)}. "
                "Attributes of the data module belong into data={...}."
            )
    if "global_batch_size" not in stage:
        raise InvalidOptionError(f"stages[{index}]: the key 'global_batch_size' is missing.")
    try:
        return BatchStage(**stage)
    except (InvalidOptionError, PlanError) as error:
        raise type(error)(f"stages[{index}]: {error}") from None


def stages_of_recipe(
    recipe: Recipe,
    global_batch_size: int | None,
    base_batch_size: int | None,
    base_lr: float | None,
    warmup_fraction: float | None,
    lr_scaling: LRScaling | None,
) -> tuple[BatchStage, ...]:
    """The stages of a recipe; ``sequence_length`` becomes the data module's.

    Args:
        recipe: the recipe.
        global_batch_size: of the first stage; the others keep their ratio to it. None: the paper's.
        base_batch_size: that base_lr and warmup_fraction belong to; None: the recipe's.
        base_lr: learning rate there; None: the recipe's.
        warmup_fraction: warm-up there; None: the recipe's.
        lr_scaling: None: the recipe's.

    Raises:
        BatchSizeError: a later stage's batch would be no whole number.
        InvalidOptionError: the recipe has no learning rate and none is given.
    """
    rule = recipe.lr_scaling if lr_scaling is None else lr_scaling
    base = recipe.base_batch_size if base_batch_size is None else base_batch_size
    fraction = recipe.warmup_fraction if warmup_fraction is None else warmup_fraction
    lr = recipe.base_lr if base_lr is None else base_lr
    if lr is None:
        raise InvalidOptionError(
            f"base_lr: the recipe {recipe.name} has no learning rate ({recipe.sources['base_lr']}). Give base_lr "
            f"(--base_lr on the command line), the learning rate at batch {base}."
        )
    batches = _batches_of(recipe, global_batch_size)
    stages = []
    for stage, batch, steps in zip(recipe.stages, batches, _steps_of(recipe, batches), strict=True):
        schedule: dict[str, Any] = {"restarts_schedule": False}
        if stage.restarts_schedule:
            schedule = {
                "lr": scaled_lr(lr, base, batch, rule),
                "warmup_fraction": scaled_warmup_fraction(fraction, base, batch),
            }
        data = {} if stage.sequence_length is None else {"sequence_length": stage.sequence_length}
        stages.append(BatchStage(batch, steps=steps, data=data, **schedule))
    return tuple(stages)


def _batches_of(recipe: Recipe, first_batch: int | None) -> list[int]:
    """Every stage's batch of a recipe, scaled by the same factor."""
    paper_first = recipe.stages[0].global_batch_size
    batch = paper_first if first_batch is None else whole_number("global_batch_size", first_batch)
    for stage in recipe.stages:
        if batch * stage.global_batch_size % paper_first:
            raise BatchSizeError(
                f"global_batch_size={batch}: a later stage of {recipe.name} has {stage.global_batch_size}/{paper_first}"
                f" of the first stage's batch, which is no whole number here. Use a multiple of "
                f"{paper_first // stage.global_batch_size}."
            )
    return [batch * stage.global_batch_size // paper_first for stage in recipe.stages]


def _steps_of(recipe: Recipe, batches: Sequence[int]) -> list[int]:
    """The steps of every stage of a recipe, keeping the samples.

    Rounded up where a schedule ends, not at each switch within it: 14063 + 1562 = 15625 steps, as printed.
    """
    steps: list[int] = []
    samples = steps_before = 0
    for stage, batch in zip(recipe.stages, batches, strict=True):
        if stage.restarts_schedule:
            samples = steps_before = 0
        samples += stage.samples
        steps_through = steps_of_samples(samples, batch)
        steps.append(steps_through - steps_before)
        steps_before = steps_through
    return steps


def growing_stages(global_batch_size: int, doublings: int) -> tuple[BatchStage, ...]:
    """Stages that see equally many samples, each at twice the batch, under one constant learning rate.

    Smith et al., "Don't decay the learning rate, increase the batch size" (arXiv 1711.00489).
    """
    number = whole_number("doublings", doublings) + 1
    first = BatchStage(global_batch_size, share=1 / number, shape="constant")
    later = [
        BatchStage(global_batch_size * 2**index, share=1 / number, restarts_schedule=False)
        for index in range(1, number)
    ]
    return (first, *later)
