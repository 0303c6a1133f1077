"""What one kernel call works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_lamb.equations import Bounds, Coefficients, NormKind, Scalar


@dataclass(frozen=True)
class Options:
    """Hyper-parameters that all pieces of a batch share.

    Attributes:
        base: whose direction is normalised: "adam" (LAMB) or "momentum" (LARS).
        beta1: decay of the first moment.
        beta2: decay of the second moment; unused by "momentum".
        eps: added to the root of the second moment; unused by "momentum".
        weight_decay: of these pieces, exemptions already applied.
        norm: which norm the trust ratio is made of.
        adapt: whether these pieces have a trust ratio; without one no norm is computed.
        maximize: ascend instead of descend.
        max_grad_value: bound on each gradient element, or None.
        differentiable: keep the autograd graph through the step.
    """

    base: str
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    norm: NormKind
    adapt: bool
    maximize: bool
    max_grad_value: float | None
    differentiable: bool


@dataclass
class Batch:
    """Aligned lists, one entry per piece of a layer; the tensors are plain and on one device.

    Attributes:
        options: what they share.
        weights: full-precision weights (the masters of half-precision parameters). `apply` modifies them in place.
        grads: gradients, in any floating dtype; never modified.
        moments1: first moments. `direction` modifies them in place.
        moments2: second moments, likewise; empty for "momentum".
        coefficients: this step's, per piece.
        grad_scale: what gradients are multiplied by (the clip coefficient), a 0-dim tensor, or None.
        parameters: the half-precision parameters whose masters ``weights`` are, or empty. `direction` takes over from
            them what somebody else changed, `apply` writes them (see `masters`).
        seeds: of the stochastic rounding of bfloat16 moments, 32 bits per piece; empty for moments in full precision.
        updates: the update directions, from `direction` to `apply`; a kernel that recomputes them leaves it empty.
        factors: what each of ``updates`` must still be multiplied by; None: by 1, or as the kernel knows.
        memory: where a kernel may keep what it would work out again at the next step of the same pieces.
    """

    options: Options
    weights: list[Tensor]
    grads: list[Tensor]
    moments1: list[Tensor]
    moments2: list[Tensor]
    coefficients: list[Coefficients]
    grad_scale: Tensor | None = None
    parameters: list[Tensor] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    updates: list[Tensor] | None = None
    factors: list[float] | None = None
    memory: dict[str, Any] = field(default_factory=dict)


class Norms(NamedTuple):
    """What a step found out about its layers, (pieces,) each: ``||w||`` before the step, ``||u||``, and the ratio."""

    weights: Tensor
    updates: Tensor
    ratios: Tensor


StepSizes = Tensor | Sequence[Scalar]
"""Per piece, learning rate times trust ratio: a (pieces,) tensor, or floats and 0-dim tensors."""


class Kernel(Protocol):
    """Computes the two local passes of a step. Between them the optimizer completes the norms over all ranks."""

    def direction(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Updates the moments and finds the update directions.

        Returns:
            (pieces,) partial statistics of the weights and of the updates (`equations.norm_statistic`); zeros where
            ``options.adapt`` is False.
        """
        ...

    def apply(self, batch: Batch, step_sizes: StepSizes) -> None:
        """``w = w - step_size*u`` for each piece, in place.

        Args:
            batch: as given to `direction`.
            step_sizes: learning rate times trust ratio.
        """
        ...

    def step(
        self, batch: Batch, scales: Sequence[Scalar], weight_norm_bounds: Bounds, trust_ratio_bounds: Bounds
    ) -> Norms | None:
        """Both passes of whole layers: `direction`, trust ratio, `apply`.

        Args:
            batch: of layers that no other rank has a piece of.
            scales: per layer, what the trust ratio is multiplied by: the learning rate, corrected.
            weight_norm_bounds: see `equations.trust_ratio`.
            trust_ratio_bounds: see `equations.trust_ratio`.

        Returns:
            None where ``options.adapt`` is False.
        """
        ...
