"""DeepSpeed: importing this makes ``"LightningLamb"``, ``"LightningLars"`` and ``"StagedWarmup"`` known in its configs.

`Lamb` and `Lars` are exact under ZeRO 0 to 3 without this import, as the ``optimizer=`` of ``deepspeed.initialize``.
Here are the JSON entries, the strategy for Lightning, and checkpoints for another number of ranks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lightning_lamb.deepspeed.checkpoints import fp32_state_dict, to_universal
from lightning_lamb.deepspeed.config import lamb_is_ours
from lightning_lamb.deepspeed.json_entries import register

if TYPE_CHECKING:
    from lightning_lamb.deepspeed.strategy import LambDeepSpeedStrategy

__all__ = ["LambDeepSpeedStrategy", "fp32_state_dict", "lamb_is_ours", "register", "to_universal"]

register()


def __getattr__(name: str) -> Any:
    """Imports the strategy, and Lightning with it, on first use; makes its names known to the Trainer."""
    if name != "LambDeepSpeedStrategy":
        raise AttributeError(f"module 'lightning_lamb.deepspeed' has no attribute {name!r}")
    from lightning_lamb.deepspeed.strategy import LambDeepSpeedStrategy
    from lightning_lamb.lightning_seams import register_strategies

    register_strategies(LambDeepSpeedStrategy)
    globals()[name] = LambDeepSpeedStrategy
    return LambDeepSpeedStrategy


if "lightning.pytorch" in sys.modules or "pytorch_lightning" in sys.modules:
    __getattr__("LambDeepSpeedStrategy")
