"""The learning rate as a function of the step, against an independent float64 construction."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.stages import (
    Stage,
    as_stages,
    learning_rate,
    multiplier,
    plan_difference,
    stage_at,
    total_steps_of,
)


@st.composite
def any_stage(draw: st.DrawFn) -> Stage:
    steps = draw(st.integers(1, 40))
    shape = draw(st.sampled_from(["poly", "cosine", "constant"]))
    return Stage(
        steps,
        draw(st.integers(0, steps)),
        scale=draw(st.floats(0.0, 4.0)),
        power=draw(st.floats(0.25, 4.0)) if shape == "poly" else 1.0,
        shape=shape,
        decay_from=draw(st.sampled_from(["start", "peak"])),
        end=0.0 if shape == "constant" else draw(st.floats(0.0, 1.0)),
    )


plans = st.lists(any_stage(), min_size=1, max_size=4)


def multipliers_by_concatenation(stages: list[Stage]) -> np.ndarray:
    """Build the whole curve from arrays: ramp, then decay, stage after stage. Shares no code with the package."""
    pieces = []
    for stage in stages:
        ramp = np.arange(1, stage.warmup_steps + 1) / max(stage.warmup_steps, 1)
        done = np.arange(stage.warmup_steps, stage.steps)
        if stage.decay_from == "start":
            progress = done / stage.steps
        else:
            progress = (done - stage.warmup_steps) / max(stage.steps - stage.warmup_steps, 1)
        if stage.shape == "poly":
            decay = stage.end + (1 - stage.end) * (1 - progress) ** stage.power
        elif stage.shape == "cosine":
            decay = stage.end + (1 - stage.end) * (1 + np.cos(np.pi * progress)) / 2
        else:
            decay = np.ones(len(progress))
        pieces += [ramp, decay]
    return np.concatenate(pieces)


def test_the_published_example_of_two_stages():
    stages = [Stage(6, 2, lr=0.01), Stage(4, 2, lr=0.005)]
    rates = [learning_rate(stages, step, base_lr=123.0) for step in range(10)]
    expected = [0.005, 0.01, 0.0066667, 0.005, 0.0033333, 0.0016667, 0.0025, 0.005, 0.0025, 0.00125]
    assert rates == pytest.approx(expected, abs=5e-8)


def test_bert_decays_from_the_first_step_not_from_the_peak():
    """After a fifth of the steps the rate is four fifths of the peak, as lr * (1 - t/T) says."""
    stages = [Stage(15625, 3125)]
    assert multiplier(stages, 3124) == 1.0
    assert multiplier(stages, 3125) == pytest.approx(0.8, abs=1e-12)
    assert multiplier([Stage(15625, 3125, decay_from="peak")], 3125) == 1.0


@given(plans)
def test_every_step_equals_the_curve_built_from_arrays(stages: list[Stage]):
    expected = multipliers_by_concatenation(stages)
    assert len(expected) == total_steps_of(stages)
    assert [multiplier(stages, step) for step in range(len(expected))] == pytest.approx(expected.tolist(), abs=1e-12)


@given(plans, st.integers(0, 300))
def test_a_multiplier_lies_between_0_and_1(stages: list[Stage], step: int):
    assert 0.0 <= multiplier(stages, step) <= 1.0


@given(plans, st.integers(0, 50))
def test_after_the_last_stage_the_decay_stays_at_its_end(stages: list[Stage], beyond: int):
    last = stages[-1]
    end = 1.0 if last.shape == "constant" else last.end
    assert multiplier(stages, total_steps_of(stages) + beyond) == pytest.approx(end, abs=1e-15)


@given(plans)
def test_within_a_stage_it_rises_to_the_peak_and_then_never_rises(stages: list[Stage]):
    start = 0
    for stage in stages:
        curve = [multiplier(stages, start + done) for done in range(stage.steps)]
        ramp, decay = curve[: stage.warmup_steps], curve[stage.warmup_steps :]
        assert all(a < b for a, b in itertools.pairwise(ramp))
        assert all(a >= b - 1e-15 for a, b in itertools.pairwise(decay))
        if ramp:
            assert ramp[-1] == 1.0
            assert ramp[0] == 1 / stage.warmup_steps
        start += stage.steps


@given(plans, st.integers(0, 300))
def test_stage_at_counts_every_step_once(stages: list[Stage], step: int):
    index, done = stage_at(stages, step)
    before = sum(stage.steps for stage in stages[:index])
    assert before + done == min(step, total_steps_of(stages))


@given(plans, st.integers(0, 200), st.floats(1e-6, 1.0))
def test_scale_multiplies_each_groups_own_rate(stages: list[Stage], step: int, base_lr: float):
    stage = stages[stage_at(stages, step)[0]]
    expected = base_lr * stage.scale * multiplier(stages, step)
    assert learning_rate(stages, step, base_lr, first_base_lr=0.5) == pytest.approx(expected, rel=1e-12)


def test_an_absolute_lr_is_the_first_groups_and_the_others_keep_their_ratio():
    stages = [Stage(4, lr=0.02)]
    assert learning_rate(stages, 0, base_lr=1.0, first_base_lr=1.0) == 0.02
    assert learning_rate(stages, 0, base_lr=10.0, first_base_lr=1.0) == pytest.approx(0.2)
    assert learning_rate(stages, 0, base_lr=0.0, first_base_lr=1.0) == 0.0
    assert learning_rate(stages, 0, base_lr=0.0, first_base_lr=0.0) == 0.02
    with pytest.raises(PlanError, match=r"that group's base learning rate is 0 and another's is 0.1"):
        learning_rate(stages, 0, base_lr=0.1, first_base_lr=0.0)


# ---- input


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": 0}, InvalidOptionError, "steps=0 must be a whole number of at least 1"),
        ({"steps": 10.0}, InvalidOptionError, "steps=10.0 must be a whole number"),
        ({"warmup_steps": -1}, InvalidOptionError, "warmup_steps=-1 must be a whole number of at least 0"),
        ({"warmup_steps": 11}, PlanError, "warmup_steps=11 is above the stage's steps=10"),
        ({"lr": -0.1}, InvalidOptionError, "lr=-0.1 must be a finite number of at least 0"),
        ({"lr": math.nan}, InvalidOptionError, "lr=nan must be a finite number"),
        ({"lr": "5e-3"}, InvalidOptionError, "lr='5e-3' is text, not a number. Write 0.005 without quotes"),
        ({"scale": -1}, InvalidOptionError, "scale=-1 must be a finite number of at least 0"),
        ({"power": 0}, InvalidOptionError, "power=0 must be a finite number above 0"),
        (
            {"shape": "poli"},
            InvalidOptionError,
            "shape='poli' is not one of: poly, cosine, constant. Did you mean 'poly'?",
        ),
        ({"decay_from": "end"}, InvalidOptionError, "decay_from='end' is not one of: start, peak"),
        ({"end": 1.5}, InvalidOptionError, "end=1.5 must be a finite number of at least 0 and of at most 1"),
        ({"lr": 0.1, "scale": 2.0}, InvalidOptionError, "lr=0.1 and scale=2.0 both set the peak"),
        ({"power": 2.0, "shape": "cosine"}, InvalidOptionError, "power=2.0 has no effect with shape='cosine'"),
        ({"end": 0.1, "shape": "constant"}, InvalidOptionError, "end=0.1 has no effect with shape='constant'"),
    ],
)
def test_a_wrong_field_is_refused_and_named(wrong: dict, error: type, message: str):
    with pytest.raises(error) as direct:
        Stage(**{"steps": 10, **wrong})
    assert message in str(direct.value)
    with pytest.raises(error) as listed:
        as_stages([{"steps": 3}, {"steps": 10, **wrong}])
    assert str(listed.value) == f"stages[1]: {direct.value}"


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([], PlanError, "has no stage"),
        ("poly", InvalidOptionError, "must be a list of stages"),
        ({"steps": 3}, InvalidOptionError, "must be a list of stages"),
        (7, InvalidOptionError, "must be a list of stages"),
        ([3], InvalidOptionError, r"stages[0]=3 must be a Stage or a dict"),
        ([{"steps": 3}, {"warmup_steps": 3}], InvalidOptionError, "stages[1]: the key 'steps' is missing"),
        (
            [{"steps": 3, "Lr": 1}],
            InvalidOptionError,
            "stages[0]: unknown key 'Lr'. Did you mean 'lr'? Known: steps, warmup_st",
        ),
        ([{"steps": 3, 5: 1}], InvalidOptionError, "stages[0]: unknown key 5."),
    ],
)
def test_what_is_no_list_of_stages_is_refused(stages: object, error: type, message: str):
    with pytest.raises(error) as refused:
        as_stages(stages)
    assert message in str(refused.value)


def test_a_plan_without_stages_or_with_a_negative_step_is_refused():
    with pytest.raises(PlanError, match="no stage"):
        multiplier([], 0)
    with pytest.raises(InvalidOptionError, match="step=-1 must be a whole number of at least 0"):
        multiplier([Stage(3)], -1)


@given(plans)
def test_dicts_and_stages_mean_the_same(stages: list[Stage]):
    assert as_stages([dataclasses.asdict(stage) for stage in stages]) == tuple(stages)
    assert as_stages(stages) == tuple(stages)


@given(plans, plans)
def test_a_difference_is_described_exactly_when_there_is_one(old: list[Stage], new: list[Stage]):
    assert bool(plan_difference(old, new, old_name="a", new_name="b")) == (old != new)


def test_the_difference_names_stage_field_and_both_values():
    old, new = [Stage(6, 2), Stage(4)], [Stage(6, 3)]
    text = plan_difference(old, new, old_name="the checkpoint", new_name="this run")
    assert text.splitlines() == [
        "stages[0].warmup_steps: 2 in the checkpoint, 3 in this run",
        "stages[1]: only in the checkpoint (steps=4)",
    ]
