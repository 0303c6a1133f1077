"""The well-known variants of LAMB, so that a recipe tuned on one of them gives the same numbers here.

Each is a function that returns `Lamb` with the original's defaults, and can stand in a config as ``class_path:
lightning_lamb.presets.nvlamb``. They differ in ways that change training; ``docs/presets.md`` has the list. All of them
treat every tensor alike (``exempt_1d=False``): the originals exempt by parameter group or by name. So do these,
given the groups of `lamb_param_groups`, which exempt what has at most one dimension.

Step counts are per parameter here. apex and timm count per group, TensorFlow globally, which differs only for a
parameter that sometimes has no gradient.
"""

from __future__ import annotations

from typing import Any

from lightning_lamb.equations import LearningRate
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.optimizers.lamb import Lamb
from lightning_lamb.param_groups import settle


def paper_lamb(
    params: Any,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
) -> Lamb:
    """Algorithm 2 to the letter: every tensor decayed and adapted, no clipping, phi the identity.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: inside the trust ratio.
        bias_correction: False leaves it out (Appendix E).
    """
    return _lamb(params, lr, betas, eps, weight_decay, bias_correction=bias_correction)


def tfa_lamb(
    params: Any,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Lamb:
    """TensorFlow Addons' ``LAMB`` (addons d208d752, ``optimizers/lamb.py``): the paper, without decay by default.

    Its two exclusion lists are `GroupRules`; an empty ``exclude_from_layer_adaptation`` there copies
    ``exclude_from_weight_decay``.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: its ``weight_decay_rate``.
    """
    return _lamb(params, lr, betas, eps, weight_decay)


def nvlamb(
    params: Any,
    lr: LearningRate = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    max_grad_norm: float | None = 1.0,
    use_nvlamb: bool = False,
) -> Lamb:
    """Apex's ``FusedLAMB`` (NVIDIA/apex 6424da3b, ``fused_lamb.py``, ``multi_tensor_lamb.cu``).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: inside the trust ratio; a group with 0 has no ratio either unless ``use_nvlamb``.
        bias_correction: divide the moments by 1-beta^t.
        max_grad_norm: global clip, on by default there too; None (which apex lacks) does not clip.
        use_nvlamb: adapt every group, also those without decay.
    """
    adapt = True if use_nvlamb else "decayed"
    return _clipping_variant(params, lr, betas, eps, weight_decay, bias_correction, adapt, None, max_grad_norm)


def timm_lamb(
    params: Any,
    lr: LearningRate = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    max_grad_norm: float | None = 1.0,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> Lamb:
    """Timm's ``Lamb`` (timm 1.0.31, ``optim/lamb.py``), without decoupled decay, caution and the like.

    Args:
        params: parameters or groups.
        lr: learning rate.
        bias_correction: divide the moments by 1-beta^t.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: inside the trust ratio; a group with 0 has no ratio either unless ``always_adapt``.
        max_grad_norm: global clip, on by default there too; None does not clip.
        trust_clip: bound the ratio by 1 from above (LAMBC).
        always_adapt: adapt every group, also those without decay.
    """
    adapt = True if always_adapt else "decayed"
    bounds = (0.0, 1.0) if trust_clip else None
    return _clipping_variant(params, lr, betas, eps, weight_decay, bias_correction, adapt, bounds, max_grad_norm)


def deepspeed_lamb(
    params: Any,
    lr: LearningRate = 1e-3,
    bias_correction: bool = True,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    max_grad_norm: float = 0.0,
) -> Lamb:
    """DeepSpeed's ``FusedLamb`` (``csrc/lamb/fused_lamb_cuda_kernel.cu``): bias correction on the learning rate.

    That makes it ``lr*sqrt(1-b2^t)/(1-b1^t)``: 0.32 of the learning rate at step 1, 0.15 at step 10, 0.8 at step 1000.

    Args:
        params: parameters or groups.
        lr: learning rate.
        bias_correction: False leaves it out.
        betas: decay rates of the two moments.
        eps: added to the root of the uncorrected second moment.
        weight_decay: inside the trust ratio.
        max_coeff: upper bound on the trust ratio.
        min_coeff: lower bound on the trust ratio.
        max_grad_norm: only 0, which means no clipping there.

    Raises:
        InvalidOptionError: another ``max_grad_norm``; DeepSpeed's engine refuses it too and clips by itself.
    """
    if max_grad_norm:
        raise InvalidOptionError(
            f'max_grad_norm={max_grad_norm}: DeepSpeed clips in its engine. Set "gradient_clipping" in its config, or '
            "use Lamb(max_grad_norm=...)."
        )
    correction: Any = "lr" if bias_correction else False
    bounds = (min_coeff, max_coeff)
    return _lamb(params, lr, betas, eps, weight_decay, bias_correction=correction, trust_ratio_bounds=bounds)


def _clipping_variant(
    params: Any,
    lr: LearningRate,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    adapt: Any,
    trust_ratio_bounds: tuple[float, float] | None,
    max_grad_norm: float | None,
) -> Lamb:
    return _lamb(
        params,
        lr,
        betas,
        eps,
        weight_decay,
        bias_correction=bias_correction,
        adapt=adapt,
        trust_ratio_bounds=trust_ratio_bounds,
        max_grad_norm=max_grad_norm,
    )


def _lamb(params: Any, *numbers: Any, **options: Any) -> Lamb:
    """`Lamb` for every tensor alike, except for groups that were made to exempt some."""
    return Lamb(settle(params, exempt_1d=True), *numbers, exempt_1d=False, **options)
