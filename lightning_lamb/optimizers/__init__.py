"""Optimizers with layer-wise normalisation: one general strategy, two base directions."""

from __future__ import annotations

from lightning_lamb.optimizers.lamb import Lamb
from lightning_lamb.optimizers.lars import Lars
from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer
from lightning_lamb.optimizers.sharded_state import ShardedStateOptimizer

__all__ = ["Lamb", "Lars", "LayerwiseOptimizer", "ShardedStateOptimizer"]
