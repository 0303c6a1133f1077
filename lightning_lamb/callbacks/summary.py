"""What LargeBatch derived, as a few lines for people and as plain numbers for checkpoints and tests."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DerivedBatch:
    """The numbers that one ``fit`` trains with.

    Attributes:
        global_batch_size: samples per optimizer step, over all ranks.
        micro_batch_size: samples per forward pass and rank.
        data_parallel_size: ranks that see different samples.
        accumulate_grad_batches: micro-batches per optimizer step and rank.
        learning_rates: peak learning rate of each parameter group.
        lr_factor: by how much LargeBatch multiplied the optimizer's own rates.
        warmup_steps: optimizer steps of the warm-up that LargeBatch set; None if it set none.
        total_steps: optimizer steps of the training; None if nothing needed to know.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_size: int
    accumulate_grad_batches: int
    learning_rates: tuple[float, ...] = ()
    lr_factor: float = 1.0
    warmup_steps: int | None = None
    total_steps: int | None = None


def describe(derived: DerivedBatch, *, lr_rule: str, schedule: str, windows: str) -> str:
    """The text that LargeBatch prints once, on rank zero.

    Args:
        derived: the numbers.
        lr_rule: how the learning rate came about.
        schedule: what steps it, and when.
        windows: how a window's gradient is averaged.
    """
    d = derived
    rates = " / ".join(f"{rate:.6g}" for rate in dict.fromkeys(d.learning_rates))
    lines = [
        f"global batch   {describe_batch(d)}",
        f"learning rate  {rates} ({lr_rule})",
    ]
    if d.total_steps is not None:
        lines.append(f"length         {d.total_steps} optimizer steps")
    if d.warmup_steps is not None:
        share = f" ({d.warmup_steps / d.total_steps:.1%})" if d.total_steps else ""
        lines.append(f"warm-up        {d.warmup_steps} optimizer steps{share}")
    lines += [f"schedule       {schedule}", f"gradient       {windows}"]
    return "LargeBatch\n" + "\n".join(f"  {line}" for line in lines)


def describe_batch(derived: DerivedBatch) -> str:
    """A global batch and what it consists of."""
    d = derived
    ranks = "1 rank" if d.data_parallel_size == 1 else f"{d.data_parallel_size} data-parallel ranks"
    product = f"micro-batch {d.micro_batch_size} x {ranks} x {d.accumulate_grad_batches} accumulated"
    return f"{d.global_batch_size} samples = {product}"


def describe_stages(batches: list[DerivedBatch], table: str, *, schedule: str, windows: str) -> str:
    """The text that LargeBatch prints once for a training in stages, on rank zero."""
    lines = [*table.splitlines(), *(f"stage {index + 1}: {describe_batch(b)}" for index, b in enumerate(batches))]
    lines += [f"schedule: {schedule}", f"gradient: {windows}"]
    return "LargeBatch\n" + "\n".join(f"  {line}" for line in lines)


def describe_windows(loss_reduction: str | None) -> str:
    """How a window's gradient is averaged; None: not by LargeBatch."""
    if loss_reduction is None:
        return "mean of the micro-batches' means, as Lightning does it"
    return f"mean over all samples of a window, or over report_count (training_step: {loss_reduction})"
