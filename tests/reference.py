"""LAMB and LARS in NumPy float64: what every other form in this repository is compared with.

Written from You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (ICLR 2020,
arXiv 1904.00962v5): section 3 (the general strategy), Algorithm 1 (LARS), Algorithm 2 (LAMB), Algorithms 3 and 4
(N-LAMB, NN-LAMB, Appendix D), Appendix E (without Adam correction) and Appendix F (other norms). It knows nothing of
torch, of sharding, of kernels or of the package under test. A *layer* is one whole parameter array.

Example:
    >>> reference = ReferenceLamb({"fc": np.ones((2, 2))}, lr=0.1, weight_decay=0.0)
    >>> reference.step({"fc": np.full((2, 2), 3.0)})
    >>> reference.weights["fc"][0, 0].round(6)  # a step of size lr * ||w|| along the direction of Adam
    np.float64(0.9)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Bounds = tuple[float, float] | None


def layer_norm(values: np.ndarray, norm: Literal["l1", "l2", "linf"]) -> float:
    """The norm of a layer taken as one vector (Appendix F); 0 for a layer without elements."""
    magnitudes = np.abs(values.ravel())
    if norm == "l1":
        return float(magnitudes.sum())
    if norm == "linf":
        return float(magnitudes.max(initial=0.0))
    return float(np.sqrt((magnitudes * magnitudes).sum()))


class LayerwiseReference:
    """Section 3: a base direction u, normalised per layer: ``w = w - lr * phi(||w||) / ||u|| * u``.

    Args:
        weights: layer name -> array of any shape. Copied to float64.
        lr: Learning rate of every step that names none.
        weight_decay: lambda. It is part of the direction, hence inside the ratio.
        norm: Norm of both weights and update.
        weight_norm_bounds: (gamma_l, gamma_u): phi(z) = min(max(z, gamma_l), gamma_u). None: phi(z) = z.
        trust_ratio_bounds: (low, high) on the ratio. None: no bounds.
        adapt: True, False (ratio 1 everywhere) or "decayed" (ratio only where the decay in force is not zero).
        exempt_1d: Layers with at most one dimension get neither decay nor ratio.
        max_grad_norm: The gradients of all layers together are scaled down to this L2 norm.
        max_grad_value: Each gradient element is first limited to [-max_grad_value, max_grad_value].
        maximize: Ascend instead of descend.
        per_layer: layer name -> options in which this layer differs from the above (``max_grad_norm`` cannot).

    Attributes:
        weights: layer name -> float64 array, after the last step.
        state: layer name -> {"step": int, "exp_avg": array, ...}; empty until the layer's first gradient.
        trust_ratios, weight_norms, update_norms: layer name -> float of the last step, adapted layers only. The weight
            norm is the one before phi and before the step; the ratio is the one that was applied, after all bounds.
        grad_norm: L2 norm of all gradients of the last step before scaling; None without ``max_grad_norm``.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], *, per_layer: Mapping[str, Any] | None, **options: Any):
        self.weights = {name: np.array(value, dtype=np.float64) for name, value in weights.items()}
        per_layer = per_layer or {}
        unknown = {key for own in per_layer.values() for key in own} - options.keys()
        if unknown or per_layer.keys() - self.weights.keys():
            raise KeyError(f"unknown options {unknown} or layers {per_layer.keys() - self.weights.keys()}")
        self.options = {name: {**options, **per_layer.get(name, {})} for name in self.weights}
        self.max_grad_norm = options["max_grad_norm"]
        self.state: dict[str, dict[str, Any]] = {name: {} for name in self.weights}
        self.trust_ratios: dict[str, float] = {}
        self.weight_norms: dict[str, float] = {}
        self.update_norms: dict[str, float] = {}
        self.grad_norm: float | None = None

    def direction(self, name: str, grad: np.ndarray, weight_decay: float) -> np.ndarray:
        """The base direction u of one layer; updates the layer's moments."""
        raise NotImplementedError

    def lr_factor(self, name: str) -> float:
        """What multiplies the learning rate after the ratio. 1 except for ``bias_correction="lr"``."""
        return 1.0

    def step(self, grads: Mapping[str, np.ndarray | None], lr: float | None = None) -> None:
        """One update. Layers whose gradient is None or absent keep weights, moments and their own step count."""
        present = {k: np.array(g, dtype=np.float64) for k, g in grads.items() if g is not None}
        self.trust_ratios, self.weight_norms, self.update_norms = {}, {}, {}
        for name, grad in self._clipped(present).items():
            self._step_layer(name, grad, self.options[name]["lr"] if lr is None else lr)

    def _clipped(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """By value first, then by the global norm of what is left: g / max(1, ||g|| / max_grad_norm)."""
        for name, grad in grads.items():
            limit = self.options[name]["max_grad_value"]
            if limit is not None:
                grads[name] = np.clip(grad, -limit, limit)
        if self.max_grad_norm is None:
            return grads
        self.grad_norm = float(np.sqrt(sum((grad * grad).sum() for grad in grads.values())))
        divisor = max(1.0, self.grad_norm / self.max_grad_norm)
        return {name: grad / divisor for name, grad in grads.items()}

    def _step_layer(self, name: str, grad: np.ndarray, lr: float) -> None:
        options, weight = self.options[name], self.weights[name]
        exempt = options["exempt_1d"] and weight.ndim <= 1
        weight_decay = 0.0 if exempt else options["weight_decay"]
        adapt = options["adapt"]
        adapted = not exempt and (weight_decay != 0 if adapt == "decayed" else adapt)

        self.state[name]["step"] = self.state[name].get("step", 0) + 1
        update = self.direction(name, -grad if options["maximize"] else grad, weight_decay)
        ratio = self._trust_ratio(name, weight, update) if adapted else 1.0
        # w = w - eta * phi(||w||) / ||u|| * u
        self.weights[name] = weight - lr * self.lr_factor(name) * ratio * update

    def _trust_ratio(self, name: str, weight: np.ndarray, update: np.ndarray) -> float:
        """phi(||w||) / ||u||, bounded; 1 where either norm is zero, whatever the bounds."""
        options = self.options[name]
        weight_norm, update_norm = layer_norm(weight, options["norm"]), layer_norm(update, options["norm"])
        ratio = 1.0
        if weight_norm > 0 and update_norm > 0:
            ratio = bounded(weight_norm, options["weight_norm_bounds"]) / update_norm
            ratio = bounded(ratio, options["trust_ratio_bounds"])
        self.trust_ratios[name], self.weight_norms[name], self.update_norms[name] = ratio, weight_norm, update_norm
        return ratio


def bounded(value: float, bounds: Bounds) -> float:
    """min(max(value, low), high); the value itself without bounds."""
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


class ReferenceLamb(LayerwiseReference):
    """Algorithm 2, and its variants of Appendices D, E and F. State: step, exp_avg (m), exp_avg_sq (v).

    Args:
        weights: See ``LayerwiseReference``, also for all arguments not listed here.
        betas: (beta1, beta2).
        eps: Added to sqrt(v_hat).
        bias_correction: True: m_hat = m / (1 - beta1^t), v_hat = v / (1 - beta2^t). False: m_hat = m, v_hat = v
            (Appendix E). "lr": as False, and lr * sqrt(1 - beta2^t) / (1 - beta1^t) after the ratio (DeepSpeed).
        nesterov: None, "first" (N-LAMB, Algorithm 3) or "both" (NN-LAMB, Algorithm 4).
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool | Literal["lr"] = True,
        nesterov: Literal["first", "both"] | None = None,
        norm: Literal["l1", "l2", "linf"] = "l2",
        weight_norm_bounds: Bounds = None,
        trust_ratio_bounds: Bounds = None,
        adapt: bool | Literal["decayed"] = True,
        exempt_1d: bool = True,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        maximize: bool = False,
        per_layer: Mapping[str, Any] | None = None,
    ):
        options = {k: v for k, v in locals().items() if k not in {"self", "weights", "per_layer", "__class__"}}
        super().__init__(weights, per_layer=per_layer, **options)

    def direction(self, name: str, grad: np.ndarray, weight_decay: float) -> np.ndarray:
        options, state = self.options[name], self.state[name]
        t = state["step"]
        beta1, beta2 = options["betas"]

        # m = b1*m + (1-b1)*g ;  v = b2*v + (1-b2)*g*g
        m = state["exp_avg"] = beta1 * state.get("exp_avg", np.zeros_like(grad)) + (1 - beta1) * grad
        v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", np.zeros_like(grad)) + (1 - beta2) * grad * grad

        corrected = options["bias_correction"] is True

        def correction(beta: float, steps: int) -> float:
            return 1 - beta**steps if corrected else 1.0

        m_hat = m / correction(beta1, t)
        v_hat = v / correction(beta2, t)
        if options["nesterov"] is not None:
            # Algorithms 3 and 4: m_hat = b1*m/(1-b1^(t+1)) + (1-b1)*g/(1-b1^t)
            m_hat = beta1 * m / correction(beta1, t + 1) + (1 - beta1) * grad / correction(beta1, t)
        if options["nesterov"] == "first":
            # Algorithm 3: v_hat = b2*v/(1-b2^t)
            v_hat = beta2 * v / correction(beta2, t)
        if options["nesterov"] == "both":
            # Algorithm 4: v_hat = b2*v/(1-b2^(t+1)) + (1-b2)*g*g/(1-b2^t)
            v_hat = beta2 * v / correction(beta2, t + 1) + (1 - beta2) * grad * grad / correction(beta2, t)

        # u = m_hat / (sqrt(v_hat) + eps) + lambda*w
        return m_hat / (np.sqrt(v_hat) + options["eps"]) + weight_decay * self.weights[name]

    def lr_factor(self, name: str) -> float:
        if self.options[name]["bias_correction"] != "lr":
            return 1.0
        t = self.state[name]["step"]
        beta1, beta2 = self.options[name]["betas"]
        return float(np.sqrt(1 - beta2**t) / (1 - beta1**t))


class ReferenceLars(LayerwiseReference):
    """Algorithm 1. State: step, exp_avg (m).

    Args:
        weights: See ``LayerwiseReference``, also for all arguments not listed here.
        momentum: beta1.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        norm: Literal["l1", "l2", "linf"] = "l2",
        weight_norm_bounds: Bounds = None,
        trust_ratio_bounds: Bounds = None,
        adapt: bool | Literal["decayed"] = True,
        exempt_1d: bool = True,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        maximize: bool = False,
        per_layer: Mapping[str, Any] | None = None,
    ):
        options = {k: v for k, v in locals().items() if k not in {"self", "weights", "per_layer", "__class__"}}
        super().__init__(weights, per_layer=per_layer, **options)

    def direction(self, name: str, grad: np.ndarray, weight_decay: float) -> np.ndarray:
        beta1, state = self.options[name]["momentum"], self.state[name]
        # m = b1*m + (1-b1)*(g + lambda*w)
        m = beta1 * state.get("exp_avg", np.zeros_like(grad)) + (1 - beta1) * (grad + weight_decay * self.weights[name])
        state["exp_avg"] = m
        return m
