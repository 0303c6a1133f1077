"""``{"type": "LightningLamb", "params": {...}}`` in a DeepSpeed config.

DeepSpeed looks for optimizers that it does not know in ``torch.optim``, and for schedulers in
``torch.optim.lr_scheduler``: that is where `register` puts ours, under names that mean nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_lamb.checks import options_of_call
from lightning_lamb.deepspeed.versions import load_deepspeed
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.optimizers import Lamb, Lars, LayerwiseOptimizer
from lightning_lamb.schedules import StagedWarmup

FUSED_LAMB_BOUNDS = {"min_coeff": 0.01, "max_coeff": 10.0}
"""Options of DeepSpeed's FusedLamb that are ``trust_ratio_bounds`` here, and its defaults."""


def lightning_lamb(params: Any, **options: Any) -> Lamb:
    """Builds `Lamb` from the ``params`` of a JSON entry.

    Args:
        params: parameters or parameter groups. Parameters with at most one dimension are exempt from decay and trust
            ratio (``exempt_1d``), by their true shapes, also where ZeRO 3 has emptied them.
        **options: those of `Lamb`; and of DeepSpeed's FusedLamb ``max_coeff`` and ``min_coeff``, which become
            ``trust_ratio_bounds``.

    Raises:
        InvalidOptionError: an option that neither knows, or one of FusedLamb that has no counterpart.
    """
    return Lamb(params, **_translated(Lamb, options))


def lightning_lars(params: Any, **options: Any) -> Lars:
    """Builds `Lars` from the ``params`` of a JSON entry; see `lightning_lamb`."""
    return Lars(params, **_translated(Lars, options))


def staged_warmup(optimizer: torch.optim.Optimizer, **options: Any) -> StagedWarmup:
    """Builds `StagedWarmup` from the ``params`` of a JSON entry.

    Raises:
        InvalidOptionError: an option that it does not know, or a value that makes no sense.
    """
    return StagedWarmup(optimizer, **options_of_call('"scheduler" in the DeepSpeed config', options, StagedWarmup))


OPTIMIZERS: dict[str, Callable[..., LayerwiseOptimizer]] = {
    "LightningLamb": lightning_lamb,
    "LightningLars": lightning_lars,
}
SCHEDULERS: dict[str, Callable[..., StagedWarmup]] = {"StagedWarmup": staged_warmup}


def register() -> None:
    """Makes the names known to DeepSpeed, and our optimizers ones that ZeRO accepts. Importing the package does it."""
    load_deepspeed()
    from deepspeed.runtime.zero import utils

    for name, build in OPTIMIZERS.items():
        setattr(torch.optim, name, build)
    for name, scheduler in SCHEDULERS.items():
        setattr(torch.optim.lr_scheduler, name, scheduler)
    for kind in (Lamb, Lars):
        # Otherwise ZeRO wants "zero_allow_untested_optimizer"; it looks for the exact class.
        if kind not in utils.ZERO_SUPPORTED_OPTIMIZERS:
            utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def _translated(kind: type[LayerwiseOptimizer], options: dict[str, Any]) -> dict[str, Any]:
    """The options with FusedLamb's translated and unknown ones refused."""
    options = dict(options)
    given = {name: options.pop(name) for name in FUSED_LAMB_BOUNDS if name in options}
    if given:
        if "trust_ratio_bounds" in options:
            raise InvalidOptionError(
                f"{', '.join(given)} and trust_ratio_bounds={options['trust_ratio_bounds']} both bound the trust "
                "ratio. Leave out FusedLamb's."
            )
        bounds = {**FUSED_LAMB_BOUNDS, **given}
        options["trust_ratio_bounds"] = (bounds["min_coeff"], bounds["max_coeff"])
    if options.pop("eps_inside_sqrt", False):
        raise InvalidOptionError(
            "eps_inside_sqrt=true is an option of DeepSpeed's FusedLamb, sqrt(v + eps). The paper's update has eps "
            "outside the root: leave it out, and keep eps small."
        )
    if options.pop("amsgrad", False):
        raise InvalidOptionError(
            "amsgrad=true: LAMB has no AMSGrad variant, and FusedLamb refuses it too. Leave it out."
        )
    return options_of_call('"optimizer" in the DeepSpeed config', options, kind)
