"""Callbacks for Lightning's Trainer: `LargeBatch`, `DeferredGradientSync` and two monitors."""

from __future__ import annotations

from lightning_lamb.callbacks.gradient_sync import DeferredGradientSync
from lightning_lamb.callbacks.large_batch import LargeBatch
from lightning_lamb.callbacks.throughput import ThroughputMonitor
from lightning_lamb.callbacks.trust_ratio_monitor import TrustRatioMonitor
from lightning_lamb.callbacks.windows import report_count

__all__ = ["DeferredGradientSync", "LargeBatch", "ThroughputMonitor", "TrustRatioMonitor", "report_count"]
