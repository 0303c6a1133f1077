"""``{"type": "LightningLamb", "params": {...}}`` in a DeepSpeed config.

DeepSpeed looks for optimizers that it does not know in ``torch.optim``, and for schedulers in
``torch.optim.lr_scheduler``: that is where `register` puts ours, under names that mean nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from lightning_lamb.build import build_optimizer, build_schedule
from lightning_lamb.checks import options_of_call
from lightning_lamb.deepspeed.versions import load_deepspeed
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.optimizers import Lamb, Lars, LayerwiseOptimizer
from lightning_lamb.optimizers.hosted import refuse_unsupported_options
from lightning_lamb.schedules import StagedWarmup
from lightning_lamb.sharding.annotate import annotate

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
        InvalidOptionError: an option that neither knows, one of FusedLamb that has no counterpart, or one that cannot
            hold under DeepSpeed (``state_dtype``, ``capturable``).
    """
    return _built(params, Lamb, options)


def lightning_lars(params: Any, **options: Any) -> Lars:
    """Builds `Lars` from the ``params`` of a JSON entry; see `lightning_lamb`."""
    return _built(params, Lars, options)


def staged_warmup(optimizer: torch.optim.Optimizer, **options: Any) -> StagedWarmup:
    """Builds `StagedWarmup` from the ``params`` of a JSON entry.

    Raises:
        InvalidOptionError: an option that it does not know, or a value that makes no sense.
    """
    given = options_of_call('"scheduler" in the DeepSpeed config', options, StagedWarmup)
    return build_schedule(optimizer, given, follow=False)  # the engine steps it after steps that were made


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


Ours = TypeVar("Ours", Lamb, Lars)


def _built(params: Any, kind: type[Ours], options: dict[str, Any]) -> Ours:
    """The optimizer, with the names of the engine's module where an engine asks for it."""
    given = _translated(kind, options)
    engine = _calling_engine()
    if engine is not None:
        annotate(engine.module)
        half = engine.fp16_enabled() or engine.bfloat16_enabled()
        if half or engine.zero_optimization_stage():
            refuse_unsupported_options(given)
    return cast("Ours", build_optimizer(params, kind, given, owner="the model given to DeepSpeed"))


def _calling_engine() -> Any:
    """The DeepSpeed engine that is building its optimizer, or None: it hands over parameters without their names."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    frame = sys._getframe(1)  # noqa: SLF001 - the one way to see who constructs
    for _ in range(8):
        owner = frame.f_locals.get("self")
        if isinstance(owner, DeepSpeedEngine):
            return owner
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


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
