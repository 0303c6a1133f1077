"""LARS."""

from __future__ import annotations

from typing import Any, Literal

from lightning_lamb.equations import Coefficients, LearningRate, Scalar
from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

_NO_COEFFICIENTS = Coefficients(1.0, 0.0, 1.0, 0.0, 1.0)


class Lars(LayerwiseOptimizer):
    """LARS: momentum whose step is rescaled layer by layer to the length of the layer's weights.

    Algorithm 1 of You et al. (arXiv 1904.00962): ``m = momentum*m + (1-momentum)*(g + weight_decay*w)``, then
    ``w = w - lr*||w||/||m||*m``. There is no trust coefficient: ``lr`` is the fraction of its norm that a layer moves.

    Args:
        params: parameters, (name, parameter) pairs as from ``model.named_parameters()``, or groups of either.
        lr: learning rate: the fraction of its own norm by which an adapted layer moves per step. A float or a
            one-element tensor.
        momentum: decay rate of the running average of the gradient, in [0, 1).
        weight_decay: added to the gradient as ``weight_decay*w`` before averaging.
        norm: norm of weights and updates in the trust ratio: "l2", "l1" or "linf" (Appendix F).
        weight_norm_bounds: (low, high) bounds on the weight norm in the ratio, phi of section 3; None has no bounds.
        trust_ratio_bounds: (low, high) bounds on the trust ratio; None has no bounds.
        adapt: whether layers have a trust ratio; "decayed": only those with weight decay.
        exempt_1d: whether parameters with at most one dimension (biases, norm scales) have neither decay nor ratio.
        max_grad_norm: bound on the norm of all gradients together, over all ranks; None does not clip.
        max_grad_value: bound on each gradient element, applied before the norm; None does not clip.
        maximize: maximize the objective instead of minimizing it.
        foreach: use the multi-tensor implementation; by default wherever it can be.
        fused: use a fused kernel: compiled C on CPUs, Triton on CUDA. By default on CPUs wherever it can be; True says
            why where it cannot.
        state_dtype: "bfloat16" keeps the moments in 2 bytes instead of 4, rounded stochastically; None keeps them in
            float32, or in the parameter's dtype where that is wider.
        capturable: keep the step count on the parameter's device, so that a CUDA graph can capture the step.
        differentiable: keep the autograd graph through the step.

    Raises:
        InvalidOptionError: an option outside its range; the message says which and what would be right.
        UnsupportedGradientError: complex parameters.
    """

    base = "momentum"
    signature = frozenset({"momentum", "adapt", "exempt_1d", "trust_ratio_bounds", "weight_norm_bounds"})

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        norm: Literal["l2", "l1", "linf"] = "l2",
        weight_norm_bounds: tuple[float, float] | None = None,
        trust_ratio_bounds: tuple[float, float] | None = None,
        adapt: bool | Literal["decayed"] = True,
        exempt_1d: bool = True,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        state_dtype: Literal["bfloat16"] | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options)

    def coefficients(self, step: Scalar, group: dict[str, Any]) -> Coefficients:  # noqa: ARG002
        """None are needed: Algorithm 1 corrects no bias."""
        return _NO_COEFFICIENTS

    def moment_decays(self, group: dict[str, Any]) -> tuple[float, float]:
        """``momentum``, and nothing for the second moment it does not have."""
        return group["momentum"], 0.0
