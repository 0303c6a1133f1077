"""LAMB and LARS as pure functions: nothing here knows about parameter groups, ranks or kernels.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020
(arXiv 1904.00962v5). Section 3 states one general strategy: take the update direction ``u`` of a base optimizer and
give each layer the step ``lr * phi(||w||) / ||u||`` along it. Algorithm 1 (LARS) takes momentum as the base optimizer,
Algorithm 2 (LAMB) takes Adam, Algorithms 3 and 4 (N-LAMB, NN-LAMB; Appendix D) take Adam with Nesterov momentum.

Symbols: ``w`` weight, ``g`` gradient, ``m`` first moment, ``v`` second moment, ``u`` update, ``t`` step (from 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor
if TYPE_CHECKING:
    LearningRate = float | Tensor
else:
    LearningRate = float  # what a command line can give: with Tensor its help would list every subclass of Tensor
BiasCorrection = bool | Literal["lr"]
Nesterov = Literal["first", "both"] | None
NormKind = Literal["l2", "l1", "linf"]
Bounds = tuple[float, float] | None


class Coefficients(NamedTuple):
    """How step ``t`` combines moments and gradient; every bias correction and Nesterov variant is five numbers.

    ``m_hat = moment1 * m + grad * g``, ``v_hat = moment2 * v + grad_square * g * g``, and the learning rate is
    multiplied by ``lr`` after the trust ratio.
    """

    moment1: Scalar
    grad: Scalar
    moment2: Scalar
    grad_square: Scalar
    lr: Scalar


def adam_coefficients(
    step: Scalar, beta1: float, beta2: float, bias_correction: BiasCorrection = True, nesterov: Nesterov = None
) -> Coefficients:
    """Returns the coefficients of ``m_hat`` and ``v_hat`` at step ``t``.

    ===================  =================================================  =====================================
    ``nesterov``         ``m_hat``                                          ``v_hat``
    ===================  =================================================  =====================================
    None (Algorithm 2)   ``m/(1-b1^t)``                                     ``v/(1-b2^t)``
    "first" (Alg. 3)     ``b1*m/(1-b1^(t+1)) + (1-b1)*g/(1-b1^t)``          ``b2*v/(1-b2^t)``
    "both" (Algorithm 4) as "first"                                         ``b2*v/(1-b2^(t+1)) + (1-b2)*g*g/(1-b2^t)``
    ===================  =================================================  =====================================

    Args:
        step: ``t``, the number of this step, 1 for the first; a float or a 0-dim tensor.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        bias_correction: True divides as in the table. False leaves the denominators out (Appendix E). "lr" leaves them
            out too and multiplies the learning rate by ``sqrt(1-b2^t)/(1-b1^t)`` after the trust ratio (DeepSpeed).
        nesterov: which moments look one step ahead.

    >>> adam_coefficients(1, 0.9, 0.999).moment1  # 1/(1 - 0.9)
    10.000000000000002
    """
    if bias_correction is True:
        now1, now2 = 1 - beta1**step, 1 - beta2**step
    else:
        now1, now2 = 1.0, 1.0
    lr: Scalar = 1.0
    if bias_correction == "lr":
        lr = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    if nesterov is None:
        return Coefficients(1 / now1, 0.0, 1 / now2, 0.0, lr)
    next1 = 1 - beta1 ** (step + 1) if bias_correction is True else 1.0
    if nesterov == "first":
        return Coefficients(beta1 / next1, (1 - beta1) / now1, beta2 / now2, 0.0, lr)
    next2 = 1 - beta2 ** (step + 1) if bias_correction is True else 1.0
    return Coefficients(beta1 / next1, (1 - beta1) / now1, beta2 / next2, (1 - beta2) / now2, lr)


def moment(previous: Tensor, value: Tensor, beta: float) -> Tensor:
    """``b*previous + (1-b)*value``: the running average of Algorithms 1 to 4."""
    return beta * previous + (1 - beta) * value


def adam_update(
    weight: Tensor, grad: Tensor, moment1: Tensor, moment2: Tensor, at: Coefficients, eps: float, weight_decay: float
) -> Tensor:
    """``u = m_hat/(sqrt(v_hat) + eps) + weight_decay*w`` (Algorithm 2); decay is inside the trust ratio.

    Args:
        weight: ``w``.
        grad: ``g``, used only by the Nesterov variants.
        moment1: ``m`` after this step's update.
        moment2: ``v`` after this step's update.
        at: this step's coefficients.
        eps: added to the root.
        weight_decay: ``lambda``.
    """
    m_hat = at.moment1 * moment1
    v_hat = at.moment2 * moment2
    if not _is_zero(at.grad):
        m_hat = m_hat + at.grad * grad
    if not _is_zero(at.grad_square):
        v_hat = v_hat + at.grad_square * grad * grad
    update = m_hat / (v_hat.sqrt() + eps)
    return update if weight_decay == 0 else update + weight_decay * weight


def decayed_gradient(weight: Tensor, grad: Tensor, weight_decay: float) -> Tensor:
    """``g + weight_decay*w``: what LARS averages (Algorithm 1)."""
    return grad if weight_decay == 0 else grad + weight_decay * weight


def norm_statistic(tensor: Tensor, norm: NormKind) -> Tensor:
    """The part of a norm that is a plain sum (or maximum) over elements, so that pieces of a layer can be combined.

    "l2": sum of squares; "l1": sum of magnitudes; "linf": largest magnitude. Combine pieces by addition (``linf``: by
    maximum), then apply `norm_of_statistic`. Accumulated in float64 where the device has it: a float32 sum of squares
    of a large layer loses digits, and of tiny weights underflows to a zero norm.

    Args:
        tensor: any shape, empty included.
        norm: which norm (Appendix F).

    Returns:
        A 0-dim tensor on the same device.
    """
    wide = statistic_dtype(tensor.device)
    if tensor.numel() == 0:
        return torch.zeros((), dtype=wide, device=tensor.device)
    order = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}[norm]
    value = torch.linalg.vector_norm(tensor, order, dtype=wide)
    return value.square() if norm == "l2" else value


def norm_of_statistic(statistic: Tensor, norm: NormKind) -> Tensor:
    """The norm whose `norm_statistic`, combined over all pieces, is ``statistic``."""
    return statistic.sqrt() if norm == "l2" else statistic


def statistic_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it (Apple's MPS, TPUs)."""
    return torch.float32 if device.type in ("mps", "xla") else torch.float64


def trust_ratio(
    weight_norm: Tensor, update_norm: Tensor, weight_norm_bounds: Bounds = None, trust_ratio_bounds: Bounds = None
) -> Tensor:
    """``phi(||w||)/||u||`` where both norms are positive, else 1.

    A layer that starts at zero would otherwise never move, and a layer with a zero update would divide by zero.

    Args:
        weight_norm: ``||w||``, any shape.
        update_norm: ``||u||``, same shape.
        weight_norm_bounds: ``(gamma_l, gamma_u)`` of ``phi(z) = min(max(z, gamma_l), gamma_u)`` (section 3); None is
            the identity.
        trust_ratio_bounds: ``(low, high)`` on the ratio itself: (0.01, 10) in DeepSpeed, (0, 1) is LAMBC.

    >>> trust_ratio(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 4.0]))
    tensor([0.5000, 1.0000])
    """
    # Written as "undefined" so that a NaN norm stays visible instead of passing for a zero layer with ratio 1.
    undefined = (weight_norm == 0) | (update_norm == 0)
    phi = weight_norm if weight_norm_bounds is None else weight_norm.clamp(*weight_norm_bounds)
    ratio = phi / torch.where(undefined, 1.0, update_norm)
    if trust_ratio_bounds is not None:
        ratio = ratio.clamp(*trust_ratio_bounds)
    return torch.where(undefined, 1.0, ratio)


def trust_ratio_of_numbers(
    weight_norm: float, update_norm: float, weight_norm_bounds: Bounds = None, trust_ratio_bounds: Bounds = None
) -> float:
    """`trust_ratio` of one layer on the host, where ten operations on tensors of one element take longer than a layer.

    >>> trust_ratio_of_numbers(2.0, 4.0), trust_ratio_of_numbers(0.0, 4.0)
    (0.5, 1.0)
    """
    if weight_norm == 0 or update_norm == 0:
        return 1.0
    ratio = _clamped(weight_norm, weight_norm_bounds) / update_norm
    return _clamped(ratio, trust_ratio_bounds)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """``1/max(1, ||g||/max_norm)``: what the gradient is multiplied by; exact, without the customary 1e-6."""
    return 1 / (norm / max_norm).clamp(min=1.0)


def _clamped(value: float, bounds: Bounds) -> float:
    """As ``Tensor.clamp``: a NaN stays one."""
    return value if bounds is None else min(max(value, bounds[0]), bounds[1])


def _is_zero(coefficient: Scalar) -> bool:
    return isinstance(coefficient, (int, float)) and coefficient == 0
