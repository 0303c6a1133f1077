"""How batch, accumulation, learning rate and warm-up follow from each other: arithmetic, nothing else.

The rules are those of You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962v5), section 4:

* ``global_batch = micro_batch * data_parallel_size * accumulate_grad_batches``
* square-root scaling: ``lr(B) = lr(B0) * sqrt(B / B0)``
* linear-epoch warm-up: ``warmup_fraction(B) = warmup_fraction(B0) * B / B0``

At a fixed number of epochs the last rule says that the warm-up takes the same number of *steps* at every batch size.
No function here looks at a Trainer, a tensor or a process group; all of them check their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from lightning_lamb.checks import finite_number, one_of, whole_number
from lightning_lamb.errors import BatchSizeError, PlanError

LRScaling = Literal["sqrt", "linear", "none"]
LastWindow = Literal["carry", "keep", "drop"]

LR_SCALINGS: tuple[str, ...] = ("sqrt", "linear", "none")
LAST_WINDOWS: tuple[str, ...] = ("carry", "keep", "drop")


def accumulate_grad_batches(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Return how many micro-batches each rank accumulates before one optimizer step.

    Args:
        global_batch_size: Samples per optimizer step, over all ranks.
        micro_batch_size: Samples per rank in one forward and backward pass.
        data_parallel_size: Ranks that see different samples. Under tensor parallelism this is not the world size.

    Raises:
        InvalidOptionError: A value is no whole number above 0.
        BatchSizeError: ``micro_batch_size * data_parallel_size`` does not divide the global batch; the message lists
            the nearest global batches, below and above, that it does divide.

    Example:
        >>> accumulate_grad_batches(32768, micro_batch_size=32, data_parallel_size=128)
        8
    """
    batch = whole_number("global_batch_size", global_batch_size)
    micro = whole_number("micro_batch_size", micro_batch_size)
    ranks = whole_number("data_parallel_size", data_parallel_size)
    if batch % (micro * ranks):
        raise BatchSizeError(_does_not_divide(batch, micro, ranks))
    return batch // (micro * ranks)


def nearest_global_batch_sizes(
    global_batch_size: int, micro_batch_size: int, data_parallel_size: int
) -> tuple[int, ...]:
    """Return the nearest global batches that can be accumulated: one below (if there is one) and one above.

    A global batch that divides is returned alone.

    Example:
        >>> nearest_global_batch_sizes(1000, micro_batch_size=32, data_parallel_size=8)
        (768, 1024)
        >>> nearest_global_batch_sizes(100, micro_batch_size=32, data_parallel_size=8)
        (256,)
    """
    batch = whole_number("global_batch_size", global_batch_size)
    window = whole_number("micro_batch_size", micro_batch_size) * whole_number("data_parallel_size", data_parallel_size)
    below = batch // window * window
    if below == batch:
        return (batch,)
    return (below, below + window) if below else (window,)


def _does_not_divide(batch: int, micro: int, ranks: int) -> str:
    nearest = " or ".join(str(size) for size in nearest_global_batch_sizes(batch, micro, ranks))
    message = (
        f"global_batch_size={batch} is not a multiple of micro_batch_size * data_parallel_size = {micro} * {ranks} = "
        f"{micro * ranks}. Nearest that divide: {nearest}."
    )
    if batch % ranks == 0:
        per_rank = batch // ranks
        small = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
        largest = max(size for size in (*small, *(per_rank // size for size in small)) if size <= micro)
        message += f" Or keep {batch} with micro_batch_size={largest}."
    return message


def scaled_lr(base_lr: float, base_batch_size: int, batch_size: int, rule: LRScaling = "sqrt") -> float:
    """Return the learning rate at ``batch_size``, given a good one at ``base_batch_size``.

    Args:
        base_lr: Learning rate at the base batch.
        base_batch_size: Global batch, in samples, that ``base_lr`` was found at.
        batch_size: Global batch, in samples, to train with.
        rule: ``"sqrt"`` (the paper's), ``"linear"`` (Goyal et al. 2017), or ``"none"``.

    Raises:
        InvalidOptionError: A value is out of range or the rule is unknown.

    Example:
        >>> scaled_lr(5e-3, base_batch_size=32768, batch_size=512)
        0.000625
        >>> scaled_lr(0.1, base_batch_size=256, batch_size=8192, rule="linear")
        3.2
    """
    lr = finite_number("base_lr", base_lr, above=0.0)
    ratio = whole_number("batch_size", batch_size) / whole_number("base_batch_size", base_batch_size)
    one_of("lr_scaling", rule, LR_SCALINGS)
    if rule == "sqrt":
        return lr * math.sqrt(ratio)
    return lr * ratio if rule == "linear" else lr


def scaled_warmup_fraction(fraction: float, base_batch_size: int, batch_size: int) -> float:
    """Return the share of the training that is warm-up at ``batch_size`` (linear-epoch warm-up).

    Args:
        fraction: Share at the base batch, from 0 to 1.
        base_batch_size: Global batch, in samples, that ``fraction`` belongs to.
        batch_size: Global batch, in samples, to train with.

    Raises:
        InvalidOptionError: A value is out of range.
        PlanError: The warm-up would be longer than the training.

    Example:
        >>> scaled_warmup_fraction(1 / 320, base_batch_size=512, batch_size=32768)
        0.2
    """
    base_fraction = finite_number("warmup_fraction", fraction, at_least=0.0, at_most=1.0)
    base = whole_number("base_batch_size", base_batch_size)
    batch = whole_number("batch_size", batch_size)
    scaled = base_fraction * batch / base
    if scaled > 1.0:
        raise PlanError(
            f"warmup_fraction={base_fraction:g} at batch {base} becomes {scaled:g} at batch {batch}: the warm-up would "
            f"be longer than the training. The largest batch for it is {int(base / base_fraction)}; use a smaller "
            "batch, a smaller warmup_fraction, or give the warm-up in steps."
        )
    return scaled


def warmup_steps(fraction: float, total_steps: int) -> int:
    """Return a share of the steps, rounded to the nearest whole step (halves go up).

    Example:
        >>> warmup_steps(0.2, 15625)
        3125
    """
    share = finite_number("warmup_fraction", fraction, at_least=0.0, at_most=1.0)
    return math.floor(share * whole_number("total_steps", total_steps) + 0.5)


def warmup_steps_of_stages(fraction: float, steps: Sequence[int], batches: Sequence[int]) -> int:
    """Return the steps that see a share of the samples of one schedule, whose batch may change on the way.

    Args:
        fraction: Share of the samples, from 0 to 1.
        steps: Optimizer steps of each stage.
        batches: Global batch of each stage.

    Example:
        >>> warmup_steps_of_stages(0.05, [333, 167, 83], [64, 128, 256]), warmup_steps_of_stages(0.2, [15625], [32768])
        (50, 3125)
    """
    if len(set(batches)) == 1:
        return warmup_steps(fraction, sum(steps))
    left = finite_number("warmup_fraction", fraction, at_least=0.0, at_most=1.0) * sum(
        number * batch for number, batch in zip(steps, batches, strict=True)
    )
    done = 0
    for number, batch in zip(steps, batches, strict=True):
        if left <= number * batch:
            return done + math.floor(left / batch + 0.5)
        left, done = left - number * batch, done + number
    return done


def steps_of_samples(samples: int, global_batch_size: int) -> int:
    """Return the optimizer steps that see at least ``samples`` samples, and less than one batch more.

    Example:
        >>> steps_of_samples(512_000_000, 32768)
        15625
    """
    return -(-whole_number("samples", samples) // whole_number("global_batch_size", global_batch_size))


def steps_per_epoch(dataset_size: int, global_batch_size: int, *, drop_last: bool = False) -> int:
    """Return the optimizer steps in one pass over the data.

    The last, smaller window counts as a step (Lightning does step on it) unless ``drop_last``. Rounding up per rank,
    per micro-batch and per window gives the same number as rounding up once, so the layout of the ranks is not needed.

    Raises:
        BatchSizeError: One global batch is larger than the dataset.

    Example:
        >>> steps_per_epoch(1_281_167, 32768), steps_per_epoch(1_281_167, 32768, drop_last=True)
        (40, 39)
    """
    samples = whole_number("dataset_size", dataset_size)
    batch = whole_number("global_batch_size", global_batch_size)
    if batch > samples:
        raise BatchSizeError(
            f"global_batch_size={batch} is larger than the dataset ({samples} samples): one accumulation would not end "
            f"within an epoch. Use a global batch of at most {samples}."
        )
    return samples // batch if drop_last else -(-samples // batch)


def steps_of_epochs(
    dataset_size: int, epochs: float, global_batch_size: int, *, last_window: LastWindow = "carry"
) -> int:
    """Return the optimizer steps in ``epochs`` passes over the data.

    Args:
        dataset_size: Samples in the dataset.
        epochs: Passes over it; may be a fraction.
        global_batch_size: Samples per optimizer step.
        last_window: What happens to samples that do not fill a batch at the end of an epoch. ``"carry"``: the next
            epoch uses them (what the paper's epochs mean: samples seen are exact). ``"keep"``: a smaller step (what
            Lightning does by default). ``"drop"``: they are left out.

    Raises:
        InvalidOptionError: A value is out of range; with ``keep`` and ``drop``, ``epochs`` must be whole.
        BatchSizeError: One global batch is larger than the dataset.

    Example:
        >>> [steps_of_epochs(1_281_167, 90, 32768, last_window=way) for way in ("carry", "keep", "drop")]
        [3519, 3600, 3510]
    """
    passes = finite_number("epochs", epochs, above=0.0)
    one_of("last_window", last_window, LAST_WINDOWS)
    per_epoch = steps_per_epoch(dataset_size, global_batch_size, drop_last=last_window == "drop")
    if last_window == "carry":
        # Through the decimal text: ten times 0.1 epochs are one epoch, not one step more.
        return math.ceil(Fraction(repr(passes)) * dataset_size / global_batch_size)
    if not passes.is_integer():
        # The steps of a part of an epoch depend on where it is cut, which only the Trainer knows.
        whole_number("epochs", epochs)
    return per_epoch * int(passes)


class ScaledRun(NamedTuple):
    """A run's learning rate and lengths after the number of ranks changed."""

    lr: float
    warmup_steps: int
    total_steps: int


def by_world_size(
    *, lr: float, warmup_steps: int, total_steps: int, from_size: int, to_size: int, lr_scaling: LRScaling = "sqrt"
) -> ScaledRun:
    """Move a run to another number of ranks, keeping the samples seen (not the steps).

    The same script on 8 ranks instead of 1 has an 8 times larger global batch: an eighth of the steps, the learning
    rate of that batch, and (linear-epoch warm-up) the same number of warm-up steps.

    Args:
        lr: Peak learning rate on ``from_size`` ranks.
        warmup_steps: Warm-up on ``from_size`` ranks, in optimizer steps.
        total_steps: Length on ``from_size`` ranks, in optimizer steps.
        from_size: Data-parallel ranks the numbers were found with.
        to_size: Data-parallel ranks to run on.
        lr_scaling: ``"sqrt"``, ``"linear"`` or ``"none"``.

    Raises:
        PlanError: The warm-up would be longer than the training.

    Example:
        >>> by_world_size(lr=1e-3, warmup_steps=100, total_steps=8000, from_size=1, to_size=4)
        ScaledRun(lr=0.002, warmup_steps=100, total_steps=2000)
    """
    old, new = whole_number("from_size", from_size), whole_number("to_size", to_size)
    ramp = whole_number("warmup_steps", warmup_steps, at_least=0)
    steps = -(-whole_number("total_steps", total_steps) * old // new)
    if ramp > steps:
        raise PlanError(
            f"warmup_steps={ramp} is above the total of {steps} steps that {total_steps} steps on {old} ranks become "
            f"on {new} ranks. Use fewer ranks, a smaller micro-batch or a shorter warm-up."
        )
    return ScaledRun(scaled_lr(lr, old, new, lr_scaling), ramp, steps)
