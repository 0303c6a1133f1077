"""LAMB and LARS that stay exact when parameters are sharded, and the arithmetic of large batches around them.

``from lightning_lamb import Lamb`` imports torch and nothing else. What needs Lightning, jsonargparse or another
optional package, and what only some users want, is imported when it is first asked for (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_lamb.__about__ import __version__
from lightning_lamb.optimizers.lamb import Lamb
from lightning_lamb.optimizers.lars import Lars
from lightning_lamb.schedules import StagedWarmup

if TYPE_CHECKING:
    from lightning_lamb.callbacks import LargeBatch, TrustRatioMonitor
    from lightning_lamb.callbacks.windows import report_count
    from lightning_lamb.cli import LambCLI
    from lightning_lamb.mixin import LambMixin
    from lightning_lamb.param_groups import GroupRules, lamb_param_groups
    from lightning_lamb.plan import make_plan, plan_from_recipe

__all__ = [
    "GroupRules",
    "Lamb",
    "LambCLI",
    "LambMixin",
    "LargeBatch",
    "Lars",
    "StagedWarmup",
    "TrustRatioMonitor",
    "__version__",
    "lamb_param_groups",
    "make_plan",
    "plan_from_recipe",
    "report_count",
]

_HOME_OF_LAZY_NAME = {
    "GroupRules": "lightning_lamb.param_groups",
    "LambCLI": "lightning_lamb.cli",
    "LambMixin": "lightning_lamb.mixin",
    "LargeBatch": "lightning_lamb.callbacks",
    "TrustRatioMonitor": "lightning_lamb.callbacks",
    "lamb_param_groups": "lightning_lamb.param_groups",
    "make_plan": "lightning_lamb.plan",
    "plan_from_recipe": "lightning_lamb.plan",
    "report_count": "lightning_lamb.callbacks.windows",
}


def __getattr__(name: str) -> Any:
    """Import a lazy name on first use and keep it."""
    if name not in _HOME_OF_LAZY_NAME:
        raise AttributeError(f"module 'lightning_lamb' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF_LAZY_NAME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted(set(globals()) | set(__all__))
