"""What LargeBatch and LambMixin refuse: what would do the same thing twice, and one resume that goes wrong silently."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import LBFGS, Optimizer

from lightning_lamb.errors import BatchSizeError, ConflictError
from lightning_lamb.lightning_scheduler_seams import rate_finder, stops_after_search
from lightning_lamb.lightning_seams import LightningModule, Trainer, inner_optimizer

# Compared by name, because the two Lightning packages have a class of that name each.
DECIDES_TOO = {
    "GradientAccumulationScheduler": (
        "set accumulate_grad_batches",
        "remove it: LargeBatch sets the accumulation from the global batch",
    ),
    "StochasticWeightAveraging": (
        "set accumulate_grad_batches",
        "use Lightning's WeightAveraging callback, which leaves the accumulation alone",
    ),
}


def refuse_conflicts(trainer: Trainer, module: LightningModule, own_accumulation: int | None) -> None:
    """Refuses everything else that would decide about accumulation.

    Args:
        trainer: before its strategy was set up.
        module: the module to train.
        own_accumulation: what LargeBatch itself set in an earlier ``fit`` of this Trainer, if any.

    Raises:
        BatchSizeError: a callback that looks for a batch size.
        ConflictError: manual optimization, an accumulation of the Trainer's own, or a callback that changes it.
    """
    if not module.automatic_optimization:
        raise ConflictError(
            f"LargeBatch needs automatic optimization, and {type(module).__name__}.automatic_optimization is False: "
            "with manual optimization the module decides itself when to step. Remove LargeBatch and accumulate in "
            "training_step (lightning_lamb.scaling.accumulate_grad_batches tells how often), or switch to automatic."
        )
    if trainer.limit_train_batches == 0:
        raise ConflictError(
            "Trainer(limit_train_batches=0) trains on nothing: LargeBatch has no window to announce. Remove it "
            "for such a run, or allow at least one batch."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for name, (what, remedy) in DECIDES_TOO.items():
            if any(kind.__name__ == name for kind in type(callback).__mro__):
                raise ConflictError(f"LargeBatch and {name} both {what}: {remedy}.")
        if any(kind.__name__ == "BatchSizeFinder" for kind in type(callback).__mro__):
            raise BatchSizeError(
                "BatchSizeFinder changes the micro-batch that LargeBatch has derived the accumulation from: remove it. "
                "Run it, or Tuner.scale_batch_size, without LargeBatch, and give LargeBatch its micro_batch_size."
            )
    if trainer.accumulate_grad_batches not in (1, own_accumulation):
        raise ConflictError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) and LargeBatch both set the "
            "accumulation: leave the Trainer's at 1; LargeBatch derives it from global_batch_size."
        )


def refuse_finder(trainer: Trainer, *, sets_rates: bool) -> None:
    """Refuses a search for a learning rate beside a LargeBatch that changes learning rates.

    Args:
        trainer: before its strategy was set up; ``Tuner.lr_find`` adds its callback before.
        sets_rates: LargeBatch multiplies the rate, or schedules it.

    Raises:
        ConflictError: there is a LearningRateFinder.
    """
    finder = rate_finder(trainer)
    if finder is not None and sets_rates:
        raise ConflictError(
            f"{type(finder).__name__} (a callback, or Tuner.lr_find) looks for a learning rate, and LargeBatch would "
            "multiply or schedule it: what is found at the global batch belongs to the global batch. Search with "
            "LargeBatch(global_batch_size=...) alone, without base_batch_size, base_lr, warm-up, stages or recipe; "
            "then train with the rate that was found, without the finder, and no scaling."
        )


def refuse_finder_beside_schedulers(trainer: Trainer, schedulers: Sequence[Any]) -> None:
    """Refuses a LearningRateFinder whose suggestion a scheduler would overwrite after the first step.

    Args:
        trainer: after its optimizers were made.
        schedulers: made with the rate from before the search.

    Raises:
        ConflictError: the finder trains on in the same ``fit`` (Tuner.lr_find does not), and there is a scheduler.
    """
    finder = rate_finder(trainer)
    if finder is not None and schedulers and not stops_after_search(finder):
        names = ", ".join(type(scheduler).__name__ for scheduler in schedulers)
        raise ConflictError(
            f"{type(finder).__name__} as a callback and the scheduler {names}: it was made before the search and "
            "overwrites the suggestion after one step. Search first, with Tuner(trainer).lr_find(model): fit then "
            "makes optimizer and scheduler with the rate that was found."
        )


def refuse_no_optimizer(trainer: Trainer, optimizers: Sequence[Optimizer], *, needed: bool) -> None:
    """Refuses to set the learning rate of no optimizer.

    Args:
        trainer: after its optimizers were made.
        optimizers: Lightning puts one without groups where configure_optimizers returned None.
        needed: LargeBatch was asked for something about learning rates.

    Raises:
        ConflictError: there is none, and one is needed.
    """
    if needed and not any(optimizer.param_groups for optimizer in optimizers):
        raise ConflictError(
            f"{type(trainer.lightning_module).__name__}.configure_optimizers returned no optimizer, and LargeBatch was "
            "asked to set its learning rate (base_lr, base_batch_size, warm-up or stages). Return an optimizer, or use "
            "LambMixin, which makes one."
        )


def refuse_double_clipping(trainer: Trainer, optimizers: Iterable[Optimizer]) -> None:
    """Refuses gradients that would be clipped by the Trainer and then again by the optimizer.

    Raises:
        ConflictError: ``Trainer(gradient_clip_val=...)`` beside the same kind of clipping in a parameter group.
    """
    trainer_value: Any = trainer.gradient_clip_val
    if not trainer_value or trainer_value <= 0:
        return
    by_value = str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)) == "value"
    option = "max_grad_value" if by_value else "max_grad_norm"
    for optimizer in optimizers:
        for group in inner_optimizer(optimizer).param_groups:
            if group.get(option) is not None:
                raise ConflictError(
                    f"gradients would be clipped twice: Trainer(gradient_clip_val={trainer_value}) and "
                    f"{type(inner_optimizer(optimizer)).__name__}({option}={group[option]}). Remove one; the "
                    "optimizer's is exact under every sharding."
                )


def refuse_hybrid_resume(strategy: Any) -> None:
    """Refuses to continue from a sharded FSDP1 checkpoint under HYBRID_SHARD, where torch restores wrong moments.

    Measured with torch 2.13: after loading, weights are those that were saved, moments are not, AdamW's neither.

    Args:
        strategy: the Trainer's, which is about to load or has loaded a checkpoint to train on.

    Raises:
        ConflictError: it is one of FSDP1 with HYBRID_SHARD and sharded checkpoints.
    """
    sharding = getattr(getattr(strategy, "sharding_strategy", None), "name", "")
    if "HYBRID" in sharding and getattr(strategy, "_state_dict_type", None) == "sharded":
        raise ConflictError(
            f"{type(strategy).__name__} with {sharding}: torch restores wrong optimizer state from a sharded "
            "checkpoint there, for every optimizer. Continue with FULL_SHARD (it reads the same checkpoint), with "
            'FSDP2 on a 2-D mesh, or, on GPUs, save with state_dict_type="full".'
        )


def refuse_repeated_closures(optimizers: Iterable[Optimizer]) -> None:
    """Refuses an optimizer that computes loss and gradients several times in one step.

    Raises:
        ConflictError: LBFGS: its closure repeats the last micro-batch of a window alone.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ConflictError(
                f"{type(optimizer).__name__} calls its closure several times in a step, and Lightning's closure is the "
                "last micro-batch of a window alone: what it would minimise is not the loss of the global batch. Use "
                "another optimizer beside LargeBatch, or LBFGS with manual optimization and without LargeBatch."
            )
