"""One counter of micro-batches, and one division: what DeepSpeed and Lightning would otherwise both do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def tell_accumulation(engine: Any, accumulate_grad_batches: int, closes_window: bool) -> None:
    """Tells DeepSpeed's engine what Lightning knows about the micro-batch that is about to go backward.

    DeepSpeed counts micro-batches over the whole training and Lightning per epoch, so that the two drift apart where an
    epoch ends inside a window, or the accumulation changes. Lightning's count decides.

    Args:
        engine: of DeepSpeed; the accumulation in its config follows, which it logs and computes throughput with.
        accumulate_grad_batches: Lightning's, now.
        closes_window: whether an optimizer step follows this micro-batch.
    """
    engine.set_gradient_accumulation_boundary(closes_window)
    if engine.gradient_accumulation_steps() != accumulate_grad_batches:
        ranks = engine.train_batch_size() // (
            engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps()
        )
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * accumulate_grad_batches * ranks)


@contextmanager
def scaled_gradients(engine: Any, factor: float) -> Iterator[None]:
    """Multiplies the accumulated gradients by ``factor`` for the ``engine.step()`` inside, before DeepSpeed clips them.

    DeepSpeed holds gradients in buffers of its own, but every wrapper divides them by a loss scale and takes their norm
    after that: so the scale is changed for one step.

    Args:
        engine: of DeepSpeed, after the last backward of a window.
        factor: a positive number.
    """
    optimizer = engine.optimizer
    if factor in (0.0, 1.0):  # 0: an empty window, whose losses were weighted by zero already
        yield
    elif hasattr(optimizer, "loss_scale_config"):  # whole parameters in half precision: the wrapper of stage 0
        scale = optimizer.loss_scale_config
        scale.cur_scale = scale.cur_scale / factor
        try:
            yield
        finally:
            scale.cur_scale = scale.cur_scale * factor
    elif hasattr(optimizer, "override_loss_scale"):  # ZeRO 1, 2 and 3
        custom, external = optimizer.custom_loss_scaler, optimizer.external_loss_scale
        optimizer.override_loss_scale(optimizer.loss_scale / factor)
        try:
            yield
        finally:
            optimizer.custom_loss_scaler, optimizer.external_loss_scale = custom, external
    else:
        # BF16_Optimizer sums gradients in float32 buffers; float32 parameters at stage 0 hold theirs themselves.
        buffers = getattr(optimizer, "fp32_groups_gradients_flat", None)
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None] if buffers is None else buffers
        for gradient in gradients:
            gradient.mul_(factor)
        yield
