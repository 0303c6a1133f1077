"""Batches for kernels, and the NumPy float64 reference walked beside them: kernels without an optimizer around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from reference import ReferenceLamb, ReferenceLars
from tolerances import assert_close

from lightning_lamb.equations import Coefficients, adam_coefficients
from lightning_lamb.kernels import eager, rounding
from lightning_lamb.kernels.batch import Batch, Options
from lightning_lamb.kernels.trust_ratios import step_sizes

ODD_SIZES = (0, 1, 7, 15, 16, 17, 511, 512, 513, 1024, 1025, 16384, 16385, 65536, 65537, 104729)
"""Around the lengths of vectors, blocks, tiles and small layers of the CPU kernel; the last is prime."""
TRITON_SIZES = (0, 1, 7, 1024, 1025, 2047, 2048, 2049, 8191, 8192, 8193, 16384, 20011)
"""Around the blocks and tiles of the Triton kernel; the last is prime."""


@dataclass
class Case:
    """What a step is asked for.

    Attributes:
        options: of `Lamb`, or of `Lars` if ``base`` is "momentum", as the reference takes them.
        base: "adam" or "momentum".
        lr: learning rate.
        dtype: of weights and moments.
        grad_dtype: of gradients; None: as weights.
        state_dtype: of moments; None: as weights.
    """

    options: dict[str, Any] = field(default_factory=dict)
    base: str = "adam"
    lr: float = 0.01
    dtype: torch.dtype = torch.float64
    grad_dtype: torch.dtype | None = None
    state_dtype: torch.dtype | None = None

    def kernel_options(self) -> Options:
        """As `Batch` wants them."""
        own = self.options
        beta1, beta2 = own.get("betas", (0.9, 0.999)) if self.base == "adam" else (own.get("momentum", 0.9), 0.0)
        return Options(
            self.base, beta1, beta2, own.get("eps", 1e-6), own.get("weight_decay", 0.01), own.get("norm", "l2"),
            bool(own.get("adapt", True)), own.get("maximize", False), own.get("max_grad_value"), False,
        )  # fmt: skip

    def coefficients(self, step: int) -> Coefficients:
        """Of one step."""
        if self.base == "momentum":
            return Coefficients(1.0, 0.0, 1.0, 0.0, 1.0)
        beta1, beta2 = self.options.get("betas", (0.9, 0.999))
        correction = self.options.get("bias_correction", True)
        return adam_coefficients(step, beta1, beta2, correction, self.options.get("nesterov"))

    def reference(self, weights: dict[str, np.ndarray]) -> Any:
        """The float64 reference; layers of any shape have decay and ratio."""
        kind = ReferenceLamb if self.base == "adam" else ReferenceLars
        return kind(weights, lr=self.lr, exempt_1d=False, **self.options)


def batch_of(case: Case, weights: Sequence[torch.Tensor], step: int = 1, seed: int = 0) -> Batch:
    """A batch on these weights (not copied), with gradients and, from the second step on, used moments."""
    draw = torch.Generator().manual_seed(seed)
    grads, moments1, moments2 = [], [], []
    for weight in weights:
        values = [torch.randn(weight.shape, generator=draw, dtype=torch.float64) for _ in range(3)]
        grads.append(torch.empty_like(weight, dtype=case.grad_dtype or case.dtype).copy_(values[0]))
        moments = [torch.zeros_like(weight, dtype=case.state_dtype or case.dtype) for _ in range(2)]
        if step > 1:
            moments[0].copy_(values[1])
            moments[1].copy_(values[2] ** 2)
        moments1.append(moments[0])
        moments2.append(moments[1])
    at = case.coefficients(step)
    narrow = case.state_dtype == torch.bfloat16
    return Batch(
        case.kernel_options(), list(weights), grads, moments1, moments2 if case.base == "adam" else [],
        [at] * len(weights), seeds=[rounding.seed(step, index) for index in range(len(weights))] if narrow else [],
    )  # fmt: skip


def scales(case: Case, batch: Batch) -> list[float]:
    """What the trust ratios are multiplied by."""
    return [case.lr * float(at.lr) for at in batch.coefficients]


def bounds(case: Case) -> tuple[Any, Any]:
    """On the weight norm and on the ratio."""
    return case.options.get("weight_norm_bounds"), case.options.get("trust_ratio_bounds")


def in_two_calls(kernel: Any, case: Case, batch: Batch) -> None:
    """`direction`, the ratio as the optimizer works it out, `apply`: what a sharded layer goes through."""
    statistics = kernel.direction(batch)
    kernel.apply(batch, step_sizes(batch.options, *statistics, scales(case, batch), *bounds(case))[0])


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    """Everything that a step changes."""
    return [*batch.weights, *batch.moments1, *batch.moments2, *batch.parameters]


def copy_of(batch: Batch) -> Batch:
    """An independent batch with the same strides."""

    def copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) if t.numel() else t.clone()
            for t in tensors
        ]

    lists = {name: copies(getattr(batch, name)) for name in ("weights", "grads", "moments1", "moments2", "parameters")}
    return replace(batch, **lists, memory={}, updates=None, factors=None)


def assert_as_eager(kernel: Any, case: Case, batch: Batch, tolerance: str, calls: int = 1) -> None:
    """One step by ``kernel`` (in one call or in two) and one by the readable kernel end in the same place."""
    expected = copy_of(batch)
    if calls == 2:
        in_two_calls(kernel, case, batch)
        in_two_calls(eager, case, expected)
    else:
        norms = kernel.step(batch, scales(case, batch), *bounds(case))
        wanted = eager.step(expected, scales(case, expected), *bounds(case))
        for name, one, other in zip(("weight norms", "update norms", "ratios"), norms or (), wanted or ()):
            assert_close(one, other, tolerance, name)
    for index, (one, other) in enumerate(zip(tensors_of(batch), tensors_of(expected), strict=True)):
        assert_close(one, other, tolerance, f"tensor {index} of shape {tuple(one.shape)}")


def walk(kernel: Any, case: Case, shapes: dict[str, tuple[int, ...]], tolerance: str, steps: int = 6) -> None:
    """Steps a kernel and the reference over the same gradients; compares weights, moments and norms at the end."""
    draw = np.random.default_rng(0)
    start = {name: np.asarray(draw.standard_normal(shape)) for name, shape in shapes.items()}
    weights = [torch.from_numpy(value.copy()).to(case.dtype) for value in start.values()]
    start = {name: weight.double().numpy().copy() for name, weight in zip(start, weights)}
    reference = case.reference(start)
    batch = batch_of(case, weights)
    for step in range(1, steps + 1):
        grads = {name: np.asarray(draw.standard_normal(shape) * 0.3) for name, shape in shapes.items()}
        batch.grads = [torch.from_numpy(grad).to(case.grad_dtype or case.dtype) for grad in grads.values()]
        limit = case.options.get("max_grad_norm")
        reference.step({name: grad.double().numpy() for name, grad in zip(grads, batch.grads)})
        if limit is not None:
            batch.grad_scale = torch.tensor(1 / max(1.0, reference.grad_norm / limit), dtype=torch.float64)
        batch.coefficients = [case.coefficients(step)] * len(weights)
        norms = kernel.step(batch, scales(case, batch), *bounds(case))
    for index, name in enumerate(shapes):
        assert_close(batch.weights[index], reference.weights[name], tolerance, name)
        assert_close(batch.moments1[index], reference.state[name]["exp_avg"], tolerance, f"moment of {name}")
        if norms is not None:
            assert_close(norms.ratios[index], reference.trust_ratios[name], tolerance, f"ratio of {name}")
            assert_close(norms.weights[index], reference.weight_norms[name], tolerance, f"weight norm of {name}")
            assert_close(norms.updates[index], reference.update_norms[name], tolerance, f"update norm of {name}")
