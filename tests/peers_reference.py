"""The well-known LAMBs in NumPy float64, each written from its own source and from nothing else.

They share no code on purpose, neither with each other nor with ``reference.py``: where two of them agree, that is a
finding. Each is reduced to what it does to whole float64 layers, with its own argument names and its own defaults, and
reproduces the order of operations of the lines it cites. Float32 details (e.g. ``sqrtf``) are outside.

Every class has ``weights`` (name -> array) and ``step(grads)`` (name -> array or None).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Grads = Mapping[str, np.ndarray | None]


def _float64(weights: Mapping[str, np.ndarray]) -> Arrays:
    return {name: np.array(value, dtype=np.float64) for name, value in weights.items()}


def _zeros(weights: Arrays) -> Arrays:
    return {name: np.zeros_like(value) for name, value in weights.items()}


class TFAddonsLamb:
    """tensorflow_addons.optimizers.LAMB, dense path.

    https://github.com/tensorflow/addons/blob/d208d752e98c310280938efa939117bf635a60a8/tensorflow_addons/optimizers/lamb.py
    L43-L50 defaults, L105 epsilon, L109-L112 the second list, L125-L130 one step count for all variables,
    L144-L181 the update. The lists are ``re.search`` on the variable's name (optimizers/utils.py L67-L75, same commit).
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        learning_rate: float = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float = 0.0,
        exclude_from_weight_decay: Sequence[str] | None = None,
        exclude_from_layer_adaptation: Sequence[str] | None = None,
    ):
        self.weights = _float64(weights)
        self.learning_rate, self.beta_1, self.beta_2 = learning_rate, beta_1, beta_2
        self.epsilon, self.weight_decay = epsilon or 1e-7, weight_decay  # L105: the Keras backend's 1e-7 for 0
        self.exclude_from_weight_decay = exclude_from_weight_decay or []
        # L109: an empty second list is replaced by the first one, too
        self.exclude_from_layer_adaptation = exclude_from_layer_adaptation or self.exclude_from_weight_decay
        self.iterations = 0
        self.m, self.v = _zeros(self.weights), _zeros(self.weights)

    def step(self, grads: Grads) -> None:
        local_step = self.iterations + 1
        for name, grad in grads.items():
            if grad is None:
                continue
            var = self.weights[name]
            m_t = self.m[name] * self.beta_1 + grad * (1 - self.beta_1)
            v_t = self.v[name] * self.beta_2 + (grad * grad) * (1 - self.beta_2)
            self.m[name], self.v[name] = m_t, v_t
            m_t_hat = m_t / (1.0 - self.beta_1**local_step)
            v_t_hat = v_t / (1.0 - self.beta_2**local_step)
            update = m_t_hat / (np.sqrt(v_t_hat) + self.epsilon)
            if not any(re.search(pattern, name) for pattern in self.exclude_from_weight_decay):
                update = update + self.weight_decay * var
            ratio = 1.0
            if not any(re.search(pattern, name) for pattern in self.exclude_from_layer_adaptation):
                w_norm, g_norm = np.linalg.norm(var.ravel()), np.linalg.norm(update.ravel())
                ratio = w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
            self.weights[name] = var - ratio * self.learning_rate * update
        self.iterations += 1


class ApexFusedLamb:
    """apex.optimizers.FusedLAMB with ``adam_w_mode=True, grad_averaging=True`` (its defaults).

    https://github.com/NVIDIA/apex/blob/6424da3b4faa6c8f062da4a48c424fff3f02d42d/csrc/multi_tensor_lamb.cu
    L53-L54 the clip, L111-L117 stage 1, L210-L217 stage 2 with ``use_nvlamb``, L281-L285 bias correction.
    https://github.com/NVIDIA/apex/blob/6424da3b4faa6c8f062da4a48c424fff3f02d42d/apex/optimizers/fused_lamb.py
    L63-L77 defaults, L125-L160 the norm is over all groups and the limit comes from ``defaults``, L167-L172 step count.
    ``decays`` stands for parameter groups: name -> weight decay of the group the layer is in.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
        decays: Mapping[str, float] | None = None,
    ):
        self.weights = _float64(weights)
        self.lr, self.bias_correction, self.betas, self.epsilon = lr, bias_correction, betas, eps
        self.max_grad_norm, self.use_nvlamb = max_grad_norm, use_nvlamb
        self.decay = dict.fromkeys(self.weights, weight_decay) | dict(decays or {})
        self.count = 0
        self.m, self.v = _zeros(self.weights), _zeros(self.weights)

    def step(self, grads: Grads) -> None:
        beta1, beta2 = self.betas
        beta3 = 1 - beta1  # grad_averaging
        present = {name: grad for name, grad in grads.items() if grad is not None}
        global_grad_norm = np.sqrt(sum(np.square(grad).sum() for grad in present.values()))
        clipped = global_grad_norm / self.max_grad_norm if global_grad_norm > self.max_grad_norm else 1.0
        self.count += 1
        correction1 = 1 - beta1**self.count if self.bias_correction else 1.0
        correction2 = 1 - beta2**self.count if self.bias_correction else 1.0
        for name, grad in present.items():
            p, decay = self.weights[name], self.decay[name]
            # stage 1: the update is stored in the gradient's place
            scaled_grad = grad / clipped
            r_m = self.m[name] * beta1 + beta3 * scaled_grad
            r_v = self.v[name] * beta2 + (1 - beta2) * scaled_grad * scaled_grad
            denom = np.sqrt(r_v / correction2) + self.epsilon
            update = (r_m / correction1) / denom + decay * p
            self.m[name], self.v[name] = r_m, r_v
            # stage 2
            ratio = self.lr
            if self.use_nvlamb or decay != 0.0:
                param_norm, update_norm = np.linalg.norm(p.ravel()), np.linalg.norm(update.ravel())
                if update_norm != 0.0 and param_norm != 0.0:
                    ratio = self.lr * (param_norm / update_norm)
            self.weights[name] = p - ratio * update


class DeepSpeedFusedLamb:
    """deepspeed.ops.lamb.FusedLamb with ``eps_inside_sqrt=False`` (mode 1) and no clipping of its own (its defaults).

    https://github.com/deepspeedai/DeepSpeed/blob/edaa7221267243c7be7fb49c5d5f5c4fb97b4641/csrc/lamb/fused_lamb_cuda_kernel.cu
    L223-L232 moments and update without any correction, L288-L297 the coefficient and its bounds, L304-L316 the step,
    L363-L370 the correction, on the learning rate.
    https://github.com/deepspeedai/DeepSpeed/blob/edaa7221267243c7be7fb49c5d5f5c4fb97b4641/deepspeed/ops/lamb/fused_lamb.py
    L41-L52 defaults, L149-L162 a step count per tensor.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ):
        self.weights = _float64(weights)
        self.lr, self.bias_correction, self.betas, self.eps, self.decay = lr, bias_correction, betas, eps, weight_decay
        self.max_coeff, self.min_coeff = max_coeff, min_coeff
        self.steps = dict.fromkeys(self.weights, 0)
        self.m, self.v = _zeros(self.weights), _zeros(self.weights)
        self.lamb_coeffs: dict[str, float] = {}

    def step(self, grads: Grads) -> None:
        b1, b2 = self.betas
        for name, g in grads.items():
            if g is None:
                continue
            self.steps[name] += 1
            step_size = self.lr
            if self.bias_correction:
                step_size *= np.sqrt(1 - b2 ** self.steps[name]) / (1 - b1 ** self.steps[name])
            p = self.weights[name]
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            update = self.m[name] / (np.sqrt(self.v[name]) + self.eps) + self.decay * p
            reg_w, reg_u = np.sqrt((p * p).sum()), np.sqrt((update * update).sum())
            lamb_coeff = 1.0
            if reg_w != 0 and reg_u != 0:
                lamb_coeff = reg_w / reg_u
                lamb_coeff = min(lamb_coeff, self.max_coeff)
                lamb_coeff = max(lamb_coeff, self.min_coeff)
            self.lamb_coeffs[name] = lamb_coeff
            self.weights[name] = p - step_size * lamb_coeff * update


class TimmLamb:
    """timm.optim.Lamb without caution, decoupled decay and ``grad_averaging=False`` (its defaults).

    https://github.com/huggingface/pytorch-image-models/blob/aa4b5850c1543fa488abf260f18390eda46cf85d/timm/optim/lamb.py
    ``__init__`` defaults, ``_get_clip_grad_norm`` (over all groups, from ``defaults``), ``step`` (count per group); the
    arithmetic is the one of ``_single_tensor_lamb`` and ``_lamb_trust_ratio`` in release 1.0.31.
    ``decays`` stands for parameter groups: name -> weight decay of the group the layer is in.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        decays: Mapping[str, float] | None = None,
    ):
        self.weights = _float64(weights)
        self.options: dict[str, Any] = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        self.max_grad_norm, self.trust_clip, self.always_adapt = max_grad_norm, trust_clip, always_adapt
        self.weight_decay = dict.fromkeys(self.weights, weight_decay) | dict(decays or {})
        self.count = 0
        self.exp_avg, self.exp_avg_sq = _zeros(self.weights), _zeros(self.weights)

    def step(self, grads: Grads) -> None:
        beta1, beta2 = self.options["betas"]
        present = {name: grad for name, grad in grads.items() if grad is not None}
        clip = None
        if self.max_grad_norm is not None and present:
            norms = np.array([np.linalg.norm(grad.ravel()) for grad in present.values()])
            clip = max(np.linalg.norm(norms) / self.max_grad_norm, 1.0)
        self.count += 1
        bias_correction1 = 1 - beta1**self.count if self.options["bias_correction"] else 1.0
        bias_correction2 = 1 - beta2**self.count if self.options["bias_correction"] else 1.0
        for name, grad in present.items():
            if clip is not None:
                grad = grad / clip
            p, weight_decay = self.weights[name], self.weight_decay[name]
            self.exp_avg[name] = self.exp_avg[name] + (1 - beta1) * (grad - self.exp_avg[name])  # lerp_
            self.exp_avg_sq[name] = self.exp_avg_sq[name] * beta2 + (1 - beta2) * grad * grad
            denom = np.sqrt(self.exp_avg_sq[name]) / bias_correction2**0.5 + self.options["eps"]
            update = self.exp_avg[name] / bias_correction1 / denom
            if weight_decay != 0:
                update = update + weight_decay * p
            if weight_decay != 0 or self.always_adapt:
                w_norm, g_norm = np.linalg.norm(p.ravel()), np.linalg.norm(update.ravel())
                trust_ratio = w_norm / g_norm if w_norm > 0 and g_norm > 0 else 1.0
                if self.trust_clip:
                    trust_ratio = min(trust_ratio, 1.0)
                update = update * trust_ratio
            self.weights[name] = p - self.options["lr"] * update
