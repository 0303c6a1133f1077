"""One cell of the composition matrix: which features stand beside LargeBatch, and what must come of it.

A feature is one row of the table in docs/composition.md. A cell takes at most one of every kind; what it does not take
is the plain case: a shuffled DataLoader of a data module, our own Lamb, no schedule, float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

SAMPLES, MICRO_BATCH, GLOBAL_BATCH, EPOCHS = 36, 2, 8, 3
"""Epochs of four windows of 8 samples and one of 4, on one rank and on two."""
RATE, SCALE = 0.01, 2.0
"""The learning rate at a batch of 2, and what the square-root rule makes of it at 8."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        name: as the table has it.
        make: builds it; its arguments depend on the kind.
        refused: None if it works; otherwise what the message must match, the feature's name in it.
        by: who refuses: our own error, or Lightning's.
        trainer: options of the Trainer.
        large_batch: options of LargeBatch.
        ranks: numbers of ranks it is run on.
        remark: what the reader must know.
        gradients: whether the window's gradient can be compared with the mean over its samples.
        needs: a package that the package's own extras do not bring.
        alone: it is like another row, and left out of the pairs.
    """

    name: str
    make: Callable[..., Any] = lambda *_: []
    refused: str | None = None
    by: str = "lightning_lamb"
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    large_batch: dict[str, Any] = dataclasses.field(default_factory=dict)
    ranks: tuple[int, ...] = (1, 2)
    remark: str = ""
    gradients: bool = True
    needs: str = ""
    alone: bool = False

    @property
    def kind(self) -> str:
        """The part of the table that the row stands in."""
        return KINDS[type(self)]


@dataclasses.dataclass(frozen=True)
class CallbackFeature(Feature):
    """``make(folder)`` gives the callback.

    Attributes:
        epochs: how many are trained, if it is not all.
        rates: where the expected learning rates come from: the "schedule", a "twin" (the same training by Lightning
            alone), or what was "found" by it.
        place: as in `LoaderFeature`, if the callback asks for one.
    """

    epochs: int | None = None
    rates: str = "schedule"
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class LoaderFeature(Feature):
    """``make()`` gives the loader.

    Attributes:
        sizes: of the micro-batches of an epoch on one rank, for a number of ranks.
        place: who has it: "fit", "datamodule", "module", or "growing", a data module whose batches grow.
        declares: ``batch_size`` of the one who has it.
        divides: that divides it in ``setup``.
        once: no sample comes twice in an epoch.
        complete: every sample comes.
        shuffles: epochs differ in their order.
        augments: samples hold noise, which no two passes and ranks share.
        length_known: before it was iterated.
    """

    sizes: Callable[[int], list[int]] = lambda ranks: even(SAMPLES // ranks)
    place: str = "fit"
    declares: int | None = None
    divides: bool = False
    once: bool = True
    complete: bool = True
    shuffles: bool = False
    length_known: bool = True
    augments: bool = False


@dataclasses.dataclass(frozen=True)
class SchedulerFeature(Feature):
    """``make(optimizer, factor, steps)`` gives the scheduler, with its own absolute rates times ``factor``.

    Attributes:
        config: further entries of Lightning's scheduler config: interval, frequency, monitor.
        rule: the same schedule in plain torch, if ``make`` is not torch's.
        cli: arguments of a LightningCLI for it.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    rule: Callable[..., Any] | None = None
    cli: tuple[str, ...] | None = None

    @property
    def interval(self) -> str:
        """When it steps."""
        return str(self.config.get("interval", "epoch"))


@dataclasses.dataclass(frozen=True)
class PrecisionFeature(Feature):
    """``make()`` gives Trainer options of which objects are part. ``tolerance``: of a window's gradient."""

    tolerance: float = 1e-5
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerFeature(Feature):
    """``make(groups)``, groups of named parameters, gives the optimizer. ``cli``: its path."""

    cli: str | None = None
    named: bool = True


@dataclasses.dataclass(frozen=True)
class ModuleFeature(Feature):
    """``make`` is not used: `training` knows how each ``builder`` comes to an optimizer."""

    builder: str = "own"


@dataclasses.dataclass(frozen=True)
class TrainerFeature(Feature):
    """Options of the Trainer. ``cut(sizes)``: which micro-batches of an epoch remain; ``steps``: how many are made."""

    cut: Callable[[list[int]], list[int]] = lambda sizes: sizes
    epochs: int | None = None
    steps: int | None = None


@dataclasses.dataclass(frozen=True)
class PlanFeature(Feature):
    """Options of LargeBatch that set the schedule. ``rates(steps)``: factors of the learning rate at every step."""

    rates: Callable[[int], list[float]] | None = None
    batches: tuple[tuple[int, int], ...] = ()


KINDS: dict[type, str] = {
    CallbackFeature: "callback",
    LoaderFeature: "loader",
    SchedulerFeature: "scheduler",
    PrecisionFeature: "precision",
    OptimizerFeature: "optimizer",
    ModuleFeature: "module",
    TrainerFeature: "trainer",
    PlanFeature: "plan",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training. ``last``: LargeBatch stands behind the callback."""

    features: tuple[Feature, ...]
    ranks: int = 1
    last: bool = False

    def of(self, kind: str) -> Any:
        """The feature of one kind, or None."""
        return next((feature for feature in self.features if feature.kind == kind), None)

    @property
    def name(self) -> str:
        """Of the test."""
        order = ", LargeBatch last" if self.last else ""
        return f"{' + '.join(f.name for f in self.features)}{order}, {self.ranks} rank{'s' * (self.ranks > 1)}"

    @property
    def refused(self) -> Feature | None:
        """The feature that is refused, if one is."""
        return next((feature for feature in self.features if feature.refused is not None), None)

    def options(self, what: str) -> dict[str, Any]:
        """The options of Trainer or LargeBatch that the features bring."""
        merged: dict[str, Any] = {}
        for feature in self.features:
            merged |= getattr(feature, what)
        return merged


def even(samples: int, size: int = MICRO_BATCH) -> list[int]:
    """Sizes of the micro-batches that so many samples make, a short one last."""
    return [min(size, samples - first) for first in range(0, samples, size)]


def alone(features: Iterable[Feature]) -> list[Cell]:
    """Every feature by itself, on each number of ranks; callbacks before and behind LargeBatch."""
    return [
        Cell((feature,), ranks, last)
        for feature in features
        for ranks in feature.ranks
        for last in ((False, True) if feature.kind == "callback" else (False,))
    ]
