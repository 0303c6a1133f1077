"""LAMB."""

from __future__ import annotations

from typing import Any, Literal

from lightning_lamb.equations import Coefficients, LearningRate, Scalar, adam_coefficients
from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer


class Lamb(LayerwiseOptimizer):
    """LAMB: Adam whose step is rescaled layer by layer to the length of the layer's weights, for very large batches.

    You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020
    (arXiv 1904.00962), Algorithm 2. Exact under every sharding it accepts: a layer cut over ranks gets the trust ratio
    of the whole layer, for one all-reduce per step.

    Args:
        params: parameters, (name, parameter) pairs as from ``model.named_parameters()``, or groups of either.
        lr: learning rate: the fraction of its own norm by which an adapted layer moves per step. A float or a
            one-element tensor.
        betas: decay rates of the running averages of the gradient and of its square, each in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: pulls weights to zero; part of the update whose norm enters the trust ratio.
        bias_correction: True divides the moments by 1-beta^t. False does not (Appendix E). "lr" instead multiplies the
            learning rate by sqrt(1-beta2^t)/(1-beta1^t) after the trust ratio, as DeepSpeed does.
        nesterov: "first" looks ahead in the first moment (N-LAMB, Algorithm 3), "both" in both (NN-LAMB, Algorithm 4).
        norm: norm of weights and updates in the trust ratio: "l2", "l1" or "linf" (Appendix F).
        weight_norm_bounds: (low, high) bounds on the weight norm in the ratio, phi of section 3; None has no bounds.
        trust_ratio_bounds: (low, high) bounds on the trust ratio: (0.01, 10) in DeepSpeed, (0, 1) is LAMBC.
        adapt: whether layers have a trust ratio; "decayed": only those with weight decay (apex's and timm's default).
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

    >>> import torch
    >>> layer = torch.nn.Linear(4, 3)
    >>> optimizer = Lamb(layer.named_parameters(), lr=0.1, weight_decay=0.0)
    >>> layer(torch.ones(2, 4)).square().sum().backward()
    >>> before = layer.weight.detach().clone()
    >>> optimizer.step()
    >>> moved = (layer.weight - before).norm() / before.norm()
    >>> round(moved.item(), 4)  # the layer moves by the fraction lr of its norm
    0.1
    >>> list(optimizer.trust_ratios)
    ['weight']
    """

    base = "adam"
    signature = frozenset({"betas", "eps", "adapt", "exempt_1d", "trust_ratio_bounds", "weight_norm_bounds"})

    def __init__(
        self,
        params: Any,
        lr: LearningRate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool | Literal["lr"] = True,
        nesterov: Literal["first", "both"] | None = None,
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

    def coefficients(self, step: Scalar, group: dict[str, Any]) -> Coefficients:
        """See `equations.adam_coefficients`."""
        beta1, beta2 = group["betas"]
        return adam_coefficients(step, beta1, beta2, group["bias_correction"], group["nesterov"])

    def moment_decays(self, group: dict[str, Any]) -> tuple[float, float]:
        """``betas``."""
        return group["betas"][0], group["betas"][1]
