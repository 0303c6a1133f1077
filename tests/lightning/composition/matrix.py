"""The matrix itself: every feature alone, and cells of several features in which every two of them meet.

    python -m tests.lightning.composition.matrix

lists its cells.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from tests.lightning.composition.callback_features import CALLBACKS
from tests.lightning.composition.cell import SAMPLES, Cell, Feature, alone, even
from tests.lightning.composition.loader_features import LOADERS
from tests.lightning.composition.other_features import MODULES, OPTIMIZERS, PLANS, PRECISIONS, TRAINER, TWICE
from tests.lightning.composition.scheduler_features import SCHEDULERS

KINDS: dict[str, list[Any]] = {
    "callback": CALLBACKS,
    "loader": LOADERS,
    "scheduler": SCHEDULERS,
    "precision": PRECISIONS,
    "optimizer": OPTIMIZERS,
    "module": MODULES,
    "trainer": TRAINER,
    "plan": PLANS,
}
ORDER = list(KINDS)
EVERYTHING = [feature for features in KINDS.values() for feature in features]
ALONE = [*alone(EVERYTHING), *TWICE]
ONE_RANK = [cell for cell in ALONE if cell.ranks == 1]
TWO_RANKS = [cell for cell in ALONE if cell.ranks == 2]


def is_quick(cell: Cell) -> bool:
    """Whether a cell of two ranks is in the default tests: what the number of ranks changes something for."""
    feature = cell.features[0]
    return not cell.last and (feature.kind != "scheduler" or not feature.alone)


# ---- which features can stand together


def fits(left: Feature, right: Feature) -> bool:
    """Whether two features can stand in one program, and the expectation of one holds beside the other."""
    pair = {left.kind: left, right.kind: right}
    return len(pair) == 2 and not any(reason(pair) for reason in APART)


def _schedule_and_plan(pair: dict[str, Any]) -> bool:
    """A plan's warm-up or stages beside a schedule are refused: a row of its own says so."""
    return "scheduler" in pair and "plan" in pair and pair["plan"].rates is not None


def _built_elsewhere(pair: dict[str, Any]) -> bool:
    """A mixin or a CLI makes the optimizer itself, and not every one."""
    module = pair.get("module")
    if module is None or module.builder == "own":
        return False
    other = next(feature for feature in pair.values() if feature is not module)
    if other.kind in ("optimizer", "scheduler"):
        return module.builder == "mixin" or other.cli is None
    return "barebones" in other.trainer or "GradScaler" in other.name  # no objects on a command line


def _options_twice(pair: dict[str, Any]) -> bool:
    """Both want the same option of LargeBatch or of the Trainer."""
    left, right = pair.values()
    return bool(left.large_batch.keys() & right.large_batch.keys() or left.trainer.keys() & right.trainer.keys())


def _no_length(pair: dict[str, Any]) -> bool:
    """A schedule of a known length, or a share of the data, beside data without a length: refused by name."""
    loader = pair.get("loader")
    if loader is None or loader.length_known:
        return False
    return any(
        (feature.kind == "plan" and feature.rates is not None and not feature.batches)
        or feature.name.startswith(("OneCycleLR", "StagedWarmup, length", "`limit_train_batches=0.5`"))
        for feature in pair.values()
    )


def _counts_otherwise(pair: dict[str, Any]) -> bool:
    """The expectation of these is written for the plain length of a training and the plain rates."""
    callback, plan, trainer, loader = (pair.get(kind) for kind in ("callback", "plan", "trainer", "loader"))
    optimizer = pair.get("optimizer")
    if optimizer is not None and trainer is not None and "fused" in optimizer.name and "clip" in trainer.name:
        return True  # with a GradScaler, Lightning refuses
    names = {feature.name for feature in pair.values()}
    if {"ModelPruning", "bf16-true"} <= names:
        return True  # its masks are float32: Lightning alone fails in the forward pass
    if callback is not None and callback.rates != "schedule":
        return bool({"plan", "module", "scheduler"} & pair.keys() or callback.rates == "found")
    scheduler = pair.get("scheduler")
    if scheduler is not None and scheduler.name.startswith("StagedWarmup left"):  # 15 steps, or refused
        other = next(feature for feature in pair.values() if feature is not scheduler)
        if other.kind == "trainer" or (other.kind == "loader" and len(other.sizes(1)) != len(even(SAMPLES))):
            return True
    if trainer is not None and trainer.name.startswith("`fast_dev_run"):
        return callback is not None or plan is not None or loader is not None or "scheduler" in pair
    if trainer is not None and trainer.name.startswith(
        ("`barebones", "`val_check", "`check_val", "`max_", "`limit", "`over")
    ):
        return bool(
            (callback is not None and (callback.epochs or callback.trainer or "barebones" in trainer.trainer))
            or (plan is not None and plan.rates is not None)
            or ("scheduler" in pair and "monitor" in pair["scheduler"].config)
            or (loader is not None and bool(loader.large_batch.get("global_batch_size")))
        )
    if plan is not None and plan.rates is not None:
        other = next(feature for feature in pair.values() if feature is not plan)
        return (
            bool(other.trainer.keys() - {"use_distributed_sampler"} or getattr(other, "epochs", None))
            or (other.kind == "loader" and other.sizes(1) != even(SAMPLES))
            or (other.kind == "precision" and other.skipped > 0 and bool(plan.batches))
        )
    return False


APART = (_schedule_and_plan, _built_elsewhere, _options_twice, _no_length, _counts_otherwise)


# ---- cells in which every two features meet


def pairs(ranks: int = 1) -> list[Cell]:
    """Cells of up to eight features. Every two that work and fit stand together in at least one of them."""
    working = [f for f in EVERYTHING if not f.refused and not f.alone and ranks in f.ranks]
    compatible = {(id(a), id(b)) for a, b in itertools.permutations(working, 2) if fits(a, b)}
    waiting = {(id(a), id(b)) for a, b in itertools.combinations(working, 2) if (id(a), id(b)) in compatible}
    by_id = {id(feature): feature for feature in working}
    place = {id(feature): index for index, feature in enumerate(working)}
    draw = random.Random(0)
    cells = []
    for first, second in sorted(waiting, key=lambda pair: (place[pair[0]], place[pair[1]])):
        if (first, second) not in waiting:
            continue
        chosen = [by_id[first], by_id[second]]
        kinds = [kind for kind in ORDER if kind not in {f.kind for f in chosen}]
        for kind in kinds:
            possible = [f for f in working if f.kind == kind and all((id(f), id(one)) in compatible for one in chosen)]
            draw.shuffle(possible)
            news = [
                sum(tuple(sorted((id(f), id(one)), key=place.__getitem__)) in waiting for one in chosen)
                for f in possible
            ]
            if news and max(news):
                chosen.append(possible[news.index(max(news))])
        for left, right in itertools.combinations(sorted((id(f) for f in chosen), key=place.__getitem__), 2):
            waiting.discard((left, right))
        chosen.sort(key=lambda f: ORDER.index(f.kind))
        cells.append(Cell(tuple(chosen), ranks, last=draw.random() < 0.5))
    return cells


if __name__ == "__main__":
    for cell in [*ALONE, *pairs(), *pairs(2)]:
        print(cell.name)
