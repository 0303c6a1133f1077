"""The fused CUDA kernel, in Triton: three launches per step for all layers of a crew together, and no host sync.

What the layers are is told by one table of addresses, sizes and numbers, uploaded from pinned memory at every step; so
the number of launches does not grow with the number of layers. With ``capturable`` step counts and learning rates stay
on the device, and a CUDA graph can replay the step: the table then holds nothing that changes.

    first_pass    per tile of a layer: moments in place, partial sums of its norms
    finish        per layer: adds up its tiles in their order; trust ratio and step size
    second_pass   per tile: works the update out again from the moments, and applies it

Symbols as in `equations`: w weight, g gradient, m and v moments, u update. Sums are taken in float64, and do not depend
on how many programs run at a time.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import triton.language as tl
from torch import Tensor

from lightning_lamb.equations import Bounds, Coefficients, Scalar
from lightning_lamb.kernels import triton_passes as passes
from lightning_lamb.kernels.aligned import Aligned, aligned, plain
from lightning_lamb.kernels.batch import Batch, Norms, StepSizes
from lightning_lamb.uncompiled import uncompiled

WARPS = 8

BASES = {"adam": passes.ADAM, "momentum": passes.MOMENTUM}
NORMS = {"l2": passes.L2, "l1": passes.L1, "linf": passes.LINF}
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def suits(parameters: Iterable[Tensor]) -> bool:
    """Whether the kernel can work on these: ordinary tensors on a CUDA device, of a dtype it knows."""
    return plain(parameters, "cuda", TYPES)


@uncompiled
def step(
    batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
) -> Norms | None:
    """See `kernels.batch.Kernel.step`."""
    call = Call(batch, scales, weight_norm_bounds, trust_ratio_bounds)
    call.first_pass()
    sizes = torch.empty(call.layers, dtype=torch.float64, device=call.device)
    found = call.finish(sizes)
    call.second_pass(sizes)
    call.hand_back()
    return Norms(found[0], found[1], found[2]) if batch.options.adapt else None


@uncompiled
def direction(batch: Batch) -> tuple[Tensor, Tensor]:
    """See `kernels.batch.Kernel.direction`."""
    call = Call(batch, [0.0] * len(batch.weights))
    call.first_pass()
    found = call.finish(None)
    call.hand_back()
    return found[0], found[1]


@uncompiled
def apply(batch: Batch, step_sizes: StepSizes) -> None:
    """See `kernels.batch.Kernel.apply`. It works the update out again: the moments must be as `direction` left them."""
    call = Call(batch, [0.0] * len(batch.weights))
    if not isinstance(step_sizes, Tensor):
        step_sizes = call.on_device(step_sizes)
    call.second_pass(step_sizes.to(torch.float64).contiguous())
    call.hand_back()


class Call:
    """The launches that one batch needs, and the tables they read.

    Args:
        batch: see `Batch`.
        scales: per layer, what the trust ratio is multiplied by.
        weight_norm_bounds: see `equations.trust_ratio`.
        trust_ratio_bounds: see `equations.trust_ratio`.
    """

    def __init__(
        self,
        batch: Batch,
        scales: Sequence[Scalar],
        weight_norm_bounds: Bounds = None,
        trust_ratio_bounds: Bounds = None,
    ) -> None:
        self.batch, self.options, self.layers = batch, batch.options, len(batch.weights)
        self.device = batch.weights[0].device
        self.aligned = aligned(batch, lambda grad: grad.dtype in TYPES)
        bounds = *(weight_norm_bounds or (0.0, math.inf)), *(trust_ratio_bounds or (0.0, math.inf))
        first_tiles, self.tiles = self._tiles()
        self.table = self._uploaded(_table(batch, self.aligned, first_tiles, bounds))
        self.coefficients = self._coefficients(batch.coefficients, scales)
        self.scale = torch.ones((), device=self.device) if batch.grad_scale is None else batch.grad_scale
        self.norm = NORMS[self.options.norm] if self.options.adapt else passes.NO_NORM
        lists = self.aligned.lists
        types = [TYPES[part[0].dtype] for part in lists[:3]]
        self.types = {
            "real": types[0],
            "grad_type": types[1],
            "moment_type": types[2],
            "copy_type": TYPES[lists[4][0].dtype] if lists[4] else types[0],
            "has_copy": bool(lists[4]),
            "aligned": not any(pointer % 16 for part in self.aligned.pointers for pointer in part),
            "base": BASES[self.options.base],
            "ahead": max(map(_terms_of_gradient, batch.coefficients)),
        }
        self.parts = torch.empty(max(2 * len(self.tiles), 1), dtype=torch.float64, device=self.device)

    def first_pass(self) -> None:
        """Moments and partial sums."""
        if len(self.tiles):
            passes.first_pass[(len(self.tiles),)](
                self.table, self.coefficients, self.scale, self.tiles, self.parts, self.layers,
                norm=self.norm, narrow=bool(self.batch.seeds), num_warps=WARPS, **self.types,
            )  # fmt: skip

    def finish(self, sizes: Tensor | None) -> Tensor:
        """Statistics of the layers; with ``sizes``, which it fills, their norms and ratios instead."""
        found = torch.zeros(3, self.layers, dtype=torch.float64, device=self.device)
        both = sizes is not None
        target = sizes if both else found
        passes.finish[(self.layers,)](
            self.table, self.coefficients, self.parts, found, target, self.layers, norm=self.norm, both=both
        )
        return found

    def second_pass(self, sizes: Tensor) -> None:
        """Updates times (layers,) step sizes."""
        if len(self.tiles):
            passes.second_pass[(len(self.tiles),)](
                self.table, self.coefficients, self.scale, self.tiles, sizes, self.layers, num_warps=WARPS, **self.types
            )

    def hand_back(self) -> None:
        """Copies to the original tensors what had to be copied for the call."""
        for original, copy in self.aligned.copied:
            original.copy_(copy)

    def on_device(self, values: Sequence[Scalar]) -> Tensor:
        """(layers,) float64 tensor of numbers on the host, or of 0-dim tensors, which may be all the same."""
        first = values[0]
        if not isinstance(first, Tensor):
            return self._uploaded(torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu"))
        if all(value is first for value in values):
            return first.to(self.device, torch.float64).reshape(1).expand(self.layers)
        return torch.stack([torch.as_tensor(value, device=self.device) for value in values]).to(torch.float64)

    def _coefficients(self, coefficients: Sequence[Coefficients], scales: Sequence[Scalar]) -> Tensor:
        """(layers, 5): what combines moments and gradient, and what the ratio is multiplied by."""
        rows = [(*at[:4], scale) for at, scale in zip(coefficients, scales)]
        if not any(isinstance(value, Tensor) for row in rows for value in row):
            return self._uploaded(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        return torch.stack([self.on_device(column) for column in zip(*rows)], 1)

    def _tiles(self) -> tuple[list[int], Tensor]:
        """Each layer's first tile, and each tile's layer; the latter is uploaded when sizes change."""
        counts = [-(-size // passes.TILE.value) for size in self.aligned.sizes]
        first = [0] * self.layers
        for index in range(1, self.layers):
            first[index] = first[index - 1] + counts[index - 1]
        known = self.batch.memory.get("tiles")
        if known is None or known[0] != counts:
            numbers = torch.arange(self.layers, dtype=torch.int32, device="cpu")
            layers = numbers.repeat_interleave(torch.tensor(counts, device="cpu"))
            known = self.batch.memory["tiles"] = counts, layers.to(self.device)
        return first, known[1]

    def _uploaded(self, values: Tensor) -> Tensor:
        """A copy on the device, without waiting for it. A captured graph reads the pinned memory again: it is kept."""
        if self.device.type != "cuda":
            return values
        values = values.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self.batch.memory.setdefault("captured", []).append(values)
        return values.to(self.device, non_blocking=True)


def _table(batch: Batch, known: Aligned, first_tiles: list[int], bounds: tuple[float, ...]) -> Tensor:
    """The numbers of the batch, then its rows: sizes, addresses, seeds, first tiles."""
    options, zeros = batch.options, [0] * len(batch.weights)
    bound = math.inf if options.max_grad_value is None else options.max_grad_value
    sign = -1.0 if options.maximize else 1.0
    betas = options.beta1, 1 - options.beta1, options.beta2, 1 - options.beta2
    numbers = array("d", [*betas, options.eps, options.weight_decay, bound, sign, *bounds])
    rows = [known.sizes, *(part or zeros for part in known.pointers), batch.seeds or zeros, first_tiles]
    return torch.tensor([*array("q", numbers.tobytes()), *chain.from_iterable(rows)], dtype=torch.int64, device="cpu")


def _terms_of_gradient(at: Coefficients) -> int:
    """How many moments look ahead. What is no number on the host is not zero."""
    first, second = (isinstance(term, Tensor) or term != 0 for term in (at.grad, at.grad_square))
    return 2 if second else int(first)
