"""What a cell must give, in plain torch and plain counting, and the comparison with what happened."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD

from tests.lightning.composition.cell import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, RATE, SCALE, Cell
from tests.lightning.composition.loader_features import SHUFFLED
from tests.lightning.composition.observed import Window, mean_gradients
from tests.lightning.composition.training import Happened, twin_rates


def check(cell: Cell, ranks: list[Happened]) -> None:
    """Compares every rank's training with the cell's outcome.

    Raises:
        AssertionError: what happened is not what was announced, or was not refused.
    """
    refusing = cell.refused
    if refusing is not None:
        for happened in ranks:
            assert happened.error, f"{refusing.name} was not refused: {len(happened.windows)} windows were trained"
            assert happened.by == refusing.by, f"refused by {happened.by}: {happened.error}"
            assert re.search(refusing.refused or "", happened.error, re.DOTALL), happened.error
        return
    for happened in ranks:
        assert not happened.error, happened.error
    first = ranks[0]
    assert all(len(happened.windows) == len(first.windows) for happened in ranks)
    check_samples(cell, ranks)
    check_rates(cell, first)
    check_announcement(cell, first)
    for happened in ranks[1:]:
        assert [window.rates for window in happened.windows] == [window.rates for window in first.windows]
        assert happened.announced == first.announced
    if all(feature.gradients for feature in cell.features):
        check_gradients(cell, ranks)


def failure_of(cell: Cell, ranks: list[Happened]) -> str:
    """The cell's name and the first line of what is wrong with it, or nothing."""
    try:
        check(cell, ranks)
    except AssertionError as error:
        return f"{cell.name}: {(str(error).splitlines() or ['?'])[0][:400]}"
    return ""


# ---- samples


def micro_batches(cell: Cell) -> list[int]:
    """Sizes of an epoch's micro-batches on one rank."""
    sizes = (cell.of("loader") or SHUFFLED).sizes(cell.ranks)
    trainer = cell.of("trainer")
    return sizes if trainer is None else trainer.cut(sizes)


def windows_of_epoch(cell: Cell, accumulation: int) -> list[int]:
    """How many samples each window of an epoch has, over all ranks; the last one may be short."""
    sizes = micro_batches(cell)
    return [cell.ranks * sum(sizes[first : first + accumulation]) for first in range(0, len(sizes), accumulation)]


def expected_windows(cell: Cell, *, planned: bool = False) -> list[list[int]]:
    """Samples per window, epoch by epoch; ``planned``: as if nothing stopped the training early."""
    batch = cell.options("large_batch").get("global_batch_size", GLOBAL_BATCH)
    callback, trainer, plan = cell.of("callback"), cell.of("trainer"), cell.of("plan")
    if plan is not None and plan.batches:
        return windows_of_stages(cell, plan.batches)
    one = windows_of_epoch(cell, batch // MICRO_BATCH // cell.ranks)
    epochs = cell.options("trainer").get("max_epochs", EPOCHS)
    for feature in (callback, trainer):
        if feature is not None and feature.epochs is not None and not (planned and feature is callback):
            epochs = min(feature.epochs, epochs if epochs > 0 else feature.epochs)
    if trainer is not None and trainer.steps is not None:
        epochs = -(-trainer.steps // len(one))
        flat = (one * epochs)[: trainer.steps]
        return [flat[first : first + len(one)] for first in range(0, len(flat), len(one))]
    return [one] * epochs


def windows_of_stages(cell: Cell, batches: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """A stage that ends ends its epoch."""
    found = []
    for steps, batch in batches:
        one = windows_of_epoch(cell, batch // MICRO_BATCH // cell.ranks)
        flat = (one * steps)[:steps]
        found += [flat[first : first + len(one)] for first in range(0, len(flat), len(one))]
    return found


def check_samples(cell: Cell, ranks: list[Happened]) -> None:
    """Who was in which window, over all ranks."""
    seen = [[sum(len(part) for part in w.samples) for w in happened.windows] for happened in ranks]
    totals = [sum(of_ranks) for of_ranks in zip(*seen, strict=True)]
    expected = [size for epoch in expected_windows(cell) for size in epoch]
    assert totals == expected, f"samples per window {totals}, expected {expected}"
    assert all(happened.global_step == len(expected) for happened in ranks), ranks[0].global_step
    data = cell.of("loader") or SHUFFLED
    whole = cell.of("trainer") is None and cell.of("plan") is None
    orders = []
    for epoch in sorted({window.epoch for window in ranks[0].windows}):
        parts = [who for h in ranks for w in h.windows if w.epoch == epoch for part in w.samples for who in part]
        orders.append(tuple(parts))
        if data.once:
            assert len(parts) == len(set(parts)), f"epoch {epoch}: samples came twice: {sorted(parts)}"
        if data.complete and data.once and whole and len(set(totals)) < 3 and ranks[0].windows[-1].epoch > epoch:
            assert sorted(parts) == list(range(len(parts))), f"epoch {epoch}: samples are missing: {sorted(parts)}"
    overfits = "overfit_batches" in cell.options("trainer")
    if data.shuffles and not overfits and len(orders) > 1 and len(orders[0]) > 8:
        assert len(set(orders)) == len(orders), "two epochs had the same order"
    if data.augments:
        check_noise(ranks)


def check_noise(ranks: list[Happened]) -> None:
    """No two samples, passes or ranks share their random numbers."""
    noise = []
    for window in (window for happened in ranks for window in happened.windows):
        for inputs, who in zip(window.inputs, (one for part in window.samples for one in part), strict=True):
            plain = torch.sin(torch.arange(1.0, 4.0) * (who + 1)).double()
            noise.append(tuple(round(float(number), 4) for number in inputs - plain))
    repeated = len(noise) - len(set(noise))
    assert not repeated, f"{repeated} of {len(noise)} samples had the noise of another one"


# ---- learning rates


def expected_rates(cell: Cell, happened: Happened) -> list[list[float]]:
    """One list of groups' rates per step that was taken."""
    callback, plan, scheduler = cell.of("callback"), cell.of("plan"), cell.of("scheduler")
    if callback is not None and callback.rates == "twin":
        return twin_rates(cell)
    factor = 1.0 if cell.options("large_batch").get("lr_scaling") == "none" else SCALE
    if callback is not None and callback.rates == "found":
        assert happened.suggestion not in (None, RATE)
        base = [happened.suggestion] * 2  # Lightning gives it to every group
    else:
        base = base_rates(cell, happened, factor)
    epochs = [len(epoch) for epoch in expected_windows(cell)]
    if plan is not None and plan.rates is not None:
        factors = plan.rates(sum(len(epoch) for epoch in expected_windows(cell, planned=True)))[: sum(epochs)]
        base = base if not plan.batches else [rate / factor for rate in base]
        return [[rate * share for rate in base] for share in factors]
    return rates_of_schedule(scheduler, base, factor, epochs, micro_batches(cell), cell)


def base_rates(cell: Cell, happened: Happened, factor: float) -> list[float]:
    """Of every group: our own modules have a second one at half the rate, all others one rate."""
    module, optimizer = cell.of("module"), cell.of("optimizer")
    groups = len(happened.windows[0].rates)
    own = module is None or module.builder == "own"
    ratios = [1.0, 0.5] if own and (optimizer is None or optimizer.name != "LBFGS") else [1.0] * groups
    return [RATE * factor * ratio for ratio in ratios]


def rates_of_schedule(
    scheduler: Any, base: list[float], factor: float, epochs: list[int], sizes: list[int], cell: Cell
) -> list[list[float]]:
    """Lightning's clock, and the same scheduler on an optimizer of plain torch that was made with these rates."""
    optimizer = SGD([{"params": [Parameter(torch.zeros(1))], "lr": rate} for rate in base], lr=base[0])
    total = sum(len(epoch) for epoch in expected_windows(cell, planned=True))
    made = None if scheduler is None else (scheduler.rule or scheduler.make)(optimizer, factor, total)
    frequency = 1 if scheduler is None else scheduler.config.get("frequency", 1)
    accumulation = GLOBAL_BATCH // MICRO_BATCH // cell.ranks
    found = []
    for epoch, steps in enumerate(epochs):
        for step in range(steps):
            found.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            micro_batch = min((step + 1) * accumulation, len(sizes))  # Lightning counts these
            if made is not None and scheduler.interval == "step" and micro_batch % frequency == 0:
                advance(made, scheduler, epoch)
        if made is not None and scheduler.interval == "epoch" and (epoch + 1) % frequency == 0:
            advance(made, scheduler, epoch)
    return found


def advance(made: Any, scheduler: Any, epoch: int) -> None:
    """One step, as Lightning makes it; the metric of the module is always 1."""
    if "monitor" in scheduler.config:
        made.step(1.0)
    elif hasattr(made, "base_lrs") or hasattr(made, "_schedulers"):
        made.step()
    else:  # not torch's: `Own.lr_scheduler_step` hands it the epoch
        made.step(epoch + 1)


def check_rates(cell: Cell, happened: Happened) -> None:
    """Every group at every step that was really taken."""
    taken = [window.rates for window in happened.windows if window.taken]
    precision = cell.of("precision")
    skipped = 0 if precision is None else precision.skipped
    assert (len(happened.windows) - len(taken) > 0) == (skipped > 0), (
        f"{len(happened.windows) - len(taken)} of {len(happened.windows)} steps were not taken"
    )
    expected = expected_rates(cell, happened)
    plan, scheduler = cell.of("plan"), cell.of("scheduler")
    ours = (plan is not None and plan.rates is not None) or (scheduler is not None and scheduler.rule is not None)
    assert len(happened.windows) == len(expected)
    assert taken, "every step was skipped"
    # StagedWarmup counts the steps that were taken; Lightning steps other schedulers after skipped ones too.
    expected = (
        expected[: len(taken)] if ours else [r for r, w in zip(expected, happened.windows, strict=True) if w.taken]
    )
    for step, (ours, theirs) in enumerate(zip(taken, expected, strict=True)):
        same = len(ours) == len(theirs) and all(
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in zip(ours, theirs, strict=True)
        )
        assert same, f"learning rates at step {step}: {ours}, expected {theirs}; all: {taken}, expected {expected}"


# ---- the announcement


def check_announcement(cell: Cell, happened: Happened) -> None:
    """What LargeBatch said about batch, accumulation, rates and length."""
    said, windows = happened.announced, happened.windows
    plan = cell.of("plan")
    if plan is not None and plan.batches:
        said_at_end = plan.batches[-1][1]
        assert said["global_batch_size"] == said_at_end
        assert windows[-1].accumulation == said["accumulation"] == said_at_end // MICRO_BATCH // cell.ranks
        return
    assert {window.accumulation for window in windows} == {said["accumulation"]}
    full = max(len(window.samples) for window in windows)
    assert full <= said["accumulation"]
    steps = sum(len(epoch) for epoch in expected_windows(cell, planned=True))
    if said["total_steps"] is not None:
        assert said["total_steps"] == steps, (said["total_steps"], steps)
    if happened.told is not None:
        assert happened.told == steps, f"estimated_stepping_batches said {happened.told}, {steps} steps were made"


# ---- gradients


def check_gradients(cell: Cell, ranks: list[Happened]) -> None:
    """The gradient of every window is the mean over its samples, in float64, on every rank."""
    precision, trainer = cell.of("precision"), cell.of("trainer")
    tolerance = 1e-5 if precision is None else precision.tolerance
    clipped = trainer is not None and "gradient_clip_val" in trainer.trainer
    fused = cell.of("optimizer") is not None and "fused" in cell.of("optimizer").name
    if fused and precision is not None and "GradScaler" in precision.name:
        return  # they are unscaled inside its step
    for step, of_ranks in enumerate(zip(*(happened.windows for happened in ranks), strict=True)):
        window: Window = of_ranks[0]
        if clipped or (precision is not None and precision.skipped and not window.taken):
            continue
        inputs, targets = (torch.cat([getattr(w, name) for w in of_ranks]) for name in ("inputs", "targets"))
        mean = mean_gradients(window.weights, inputs, targets)
        size = max(float(gradient.abs().max()) for gradient in mean.values())
        for mine in of_ranks:
            for name, gradient in mine.gradients.items():
                wrong = float((gradient - mean[name]).abs().max()) / size
                assert wrong < tolerance, f"step {step}, {name}: gradient off by {wrong:.1e} of the largest"
