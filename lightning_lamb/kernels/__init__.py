"""Who computes the local passes? Interchangeable implementations of `batch.Kernel`, the readable one first."""

from __future__ import annotations

from lightning_lamb.kernels import eager, foreach
from lightning_lamb.kernels.batch import Batch, Kernel, Norms, Options, StepSizes

__all__ = ["Batch", "Kernel", "Norms", "Options", "StepSizes", "eager", "foreach"]
