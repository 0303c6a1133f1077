"""Every error this package raises on purpose.

Each message names the option or tensor, its value, the cause and the remedy. Each class also derives from the built-in
exception that torch or Lightning would raise in its place, so existing ``except ValueError`` handlers keep working.
"""

from __future__ import annotations


class LightningLambError(Exception):
    """Base class: ``except LightningLambError`` catches everything that lightning_lamb refuses."""


class InvalidOptionError(LightningLambError, ValueError):
    """A hyper-parameter or option has a value, or a combination of values, that cannot be meant."""


class BatchSizeError(LightningLambError, ValueError):
    """A global batch that micro-batch, ranks and accumulation cannot produce."""


class PlanError(LightningLambError, ValueError):
    """Stages, warm-up or totals that do not add up, or that changed under a resumed run."""


class UnknownShardError(LightningLambError, RuntimeError):
    """A parameter is a piece of a layer whose other pieces the optimizer cannot find."""


class UnsupportedGradientError(LightningLambError, RuntimeError):
    """A sparse or complex gradient."""


class StateDictError(LightningLambError, ValueError):
    """A state dict of another optimizer, or of tensors with other shapes; nothing was loaded."""


class ConflictError(LightningLambError, RuntimeError):
    """Two parts of the training set-up would both do the same thing (clip, accumulate, scale)."""


class PromiseError(LightningLambError, RuntimeError):
    """A number that LargeBatch announced is not the number that trains."""


class MissingDependencyError(LightningLambError, ImportError):
    """An optional package that this feature needs is not installed."""


class RankDisagreementError(LightningLambError, RuntimeError):
    """Ranks that train together were given different layers, options, batches or lengths."""
