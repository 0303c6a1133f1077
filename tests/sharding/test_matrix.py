"""A layer cut over ranks gets the step of the whole layer: every layout, all layers or adapted only, clipped or not.

One training per case, 20 steps, on gloo: with the same gradients the weights are those of the NumPy float64 reference;
with a real backward pass the run drifts from float64 as one process does in the same precision. Collectives are
counted. Every layout runs by default; every combination of layout and option is marked slow.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from sharding.layouts import LAYOUTS, Layout
from sharding.runs import Case, drift_alone, layout_of
from tolerances import TOLERANCE

EXACT = TOLERANCE["sharded"].relative
SINGLE_RATIO = 1e-5
"""Trust ratios carry the rounding of an update in which opposing gradients cancel (see "float32 ratio")."""

VARIANTS: dict[str, dict[str, Any]] = {
    "L1 norm": {"options": (("norm", "l1"),)},
    "Linf norm": {"options": (("norm", "linf"),)},
    "Linf norm, all layers": {"options": (("norm", "linf"),), "alike": True},
    "Lars": {"lars": True},
    "Lars, L1 norm, all layers": {"lars": True, "alike": True, "options": (("norm", "l1"),)},
    "N-LAMB": {"options": (("nesterov", "first"),)},
    "NN-LAMB": {"options": (("nesterov", "both"),)},
    "bounds": {"options": (("weight_norm_bounds", (0.5, 3.0)), ("trust_ratio_bounds", (0.1, 2.0)))},
    "max_grad_value": {"options": (("max_grad_value", 0.1),), "clip": 0.5},
    "foreach=False": {"options": (("foreach", False),), "clip": 0.5},
}


def shows(layout: Layout, feature: str, verdict: str = "exact") -> pytest.MarkDecorator:
    return pytest.mark.shows(layout.name, feature, verdict)


def clips(layout: Layout) -> tuple[float | None, ...]:
    """Torch's ZeroRedundancyOptimizer with a clip norm is refused: see test_refusals.py."""
    return (None,) if layout.zero == "torch" else (None, 0.5)


ONLY_ON_FOUR = {layout.name for layout in LAYOUTS} - {layout.name for layout in LAYOUTS if layout.ranks == 2}


def is_thin(case: Case) -> bool:
    """Whether the case belongs to the part that runs by default: every layout, and every option in one of them."""
    twice = case.ranks == 4 and case.layout not in ONLY_ON_FOUR
    if case.options or case.lars:
        return case.layout == "FSDP2" and case.ranks == 2
    if case.source == "prescribed":
        return not twice or (case.alike and bool(case.clip))
    return not twice and case.alike != case.mixed and (bool(case.clip) != case.mixed or layout_of(case).zero == "torch")


def param(case: Case, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(case, id=str(case), marks=[*marks, *([] if is_thin(case) else [pytest.mark.slow])])


def prescribed_cases() -> list[Any]:
    found = []
    for layout in LAYOUTS:
        for alike, clip in itertools.product((False, True), clips(layout)):
            case = Case(layout.name, layout.ranks, "prescribed", alike, clip)
            marks = [shows(layout, "all layers adapted" if alike else "adapted layers")]
            marks += [shows(layout, "max_grad_norm")] * bool(clip)
            found.append(param(case, *marks))
    return found


def backward_cases() -> list[Any]:
    found = []
    for layout in LAYOUTS:
        for alike, clip, mixed in itertools.product((False, True), clips(layout), (False, True)):
            case = Case(layout.name, layout.ranks, "backward", alike, clip, mixed)
            found.append(param(case, shows(layout, "bf16-mixed" if mixed else "float32")))
    return found


def variant_cases() -> list[Any]:
    """Every option that the norms or the reduction depend on, where layers are cut."""
    found = []
    for layout in LAYOUTS:
        if layout.groups:
            for name, options in VARIANTS.items():
                case = Case(layout.name, layout.ranks, **options)
                column = {"L": "L1, Linf", "N": "Nesterov"}.get(name[0], "bounds, value clip")
                column = "Lars" if case.lars else column
                found.append(param(case, shows(layout, column)))
    return found


def shuffled_cases() -> list[Any]:
    """Clipped, and trained for real, so that partial gradients are added up too."""
    cases = [
        Case(layout.name, layout.ranks, "backward", alike=True, clip=0.5, shuffled=True)
        for layout in LAYOUTS
        if layout.groups
    ]
    return [pytest.param(case, id=str(case)) for case in cases]


def blind_cases() -> list[Any]:
    return [
        param(Case(layout.name, layout.ranks, "prescribed", alike, blind=True))
        for layout in LAYOUTS
        for alike in (False, True)
        if layout.groups
    ]


@pytest.mark.parametrize("case", [*prescribed_cases(), *variant_cases()])
def test_prescribed_gradients_lead_where_the_reference_goes(case, outcomes):
    for outcome in outcomes.of(case):
        assert not outcome.failure, outcome.failure
        assert outcome.error <= EXACT
        assert outcome.ratio_error <= SINGLE_RATIO
        assert outcome.norm_error <= EXACT


@pytest.mark.parametrize("case", shuffled_cases())
def test_the_order_of_parameters_may_be_another_on_every_rank(case, outcomes):
    """A set of names in a user's grouping code does it: norms of different layers were added up, silently."""
    for outcome in outcomes.of(case):
        assert not outcome.failure, outcome.failure
        assert outcome.error <= EXACT
        assert outcome.ratio_error <= SINGLE_RATIO
        assert outcome.norm_error <= EXACT


@pytest.mark.parametrize("case", backward_cases())
def test_a_real_training_leads_where_the_reference_goes_with_the_same_gradients(case, outcomes):
    for outcome in outcomes.of(case):
        assert not outcome.failure, outcome.failure
        assert outcome.error <= EXACT
        assert outcome.norm_error <= EXACT


@pytest.mark.parametrize("case", backward_cases())
def test_a_real_training_drifts_no_further_than_twice_one_process(case, outcomes):
    allowed = drift_alone(case)
    for outcome in outcomes.of(case):
        assert not outcome.failure, outcome.failure
        assert {kind: value for kind, value in outcome.drift.items() if value > 2 * allowed[kind]} == {}


@pytest.mark.parametrize("case", [*prescribed_cases(), *backward_cases(), *variant_cases()])
def test_collectives_are_one_per_process_group_and_one_more_to_clip(case, outcomes):
    """And, each for all layers together, one to add up partial gradients and one to gather weights (ZeRO-1).

    In the first step also one per process group in which the ranks compare their layers.
    """
    layout = layout_of(case)
    for outcome in outcomes.of(case):
        expected = {"allreduce_": layout.groups + bool(layout.groups and case.clip)}
        if layout.partial and case.source == "backward":
            expected["allreduce_"] += 1
        if layout.zero == "ours":
            expected["_allgather_base_"] = 1
        if layout.zero == "torch":
            expected["broadcast_"] = 10  # torch's own: one per trained layer
        first = expected | {"allreduce_": expected["allreduce_"] + layout.compared}
        found = [expected if step else first for step in range(20)]
        assert outcome.collectives == [{name: count for name, count in one.items() if count} for one in found]
        assert len(outcome.collectives) == 20


@pytest.mark.parametrize("case", [*prescribed_cases(), *backward_cases()])
def test_every_rank_reports_every_adapted_layer(case, outcomes):
    """Also layers of which it holds no element, as most ranks under FSDP1: TrustRatioMonitor logs on rank zero."""
    adapted = {"first.weight", "wide.weight", "zero.weight", "narrow.weight"}
    if case.alike:
        adapted |= {"scale", "first.bias", "norm.0.weight", "norm.0.bias", "wide.bias", "narrow.bias"}
    reports = [set(outcome.names) for outcome in outcomes.of(case)]
    if layout_of(case).zero == "torch":  # knows its own layers only
        assert set.union(*reports) == adapted
    else:
        assert reports == [adapted] * case.ranks


@pytest.mark.parametrize("case", blind_cases())
def test_an_optimizer_that_takes_slices_for_layers_is_wrong_by_orders_of_magnitude(case, outcomes):
    """So the tests above can fail."""
    found = outcomes.of(case)
    disagree = any("ranks disagree" in outcome.failure for outcome in found)
    assert disagree or min(outcome.error for outcome in found) > 1000 * EXACT
