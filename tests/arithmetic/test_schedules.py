"""`StagedWarmup` on optimizers: the pure function's rates, a length known later, wrong options."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from arithmetic.schedule_runs import RATES, STAGES, first_group, run, sgd

from lightning_lamb.errors import InvalidOptionError, PlanError
from lightning_lamb.schedules import Stage, StagedWarmup

# ---- rates


def test_the_worked_example_step_by_step():
    optimizer = sgd()
    scheduler = StagedWarmup(optimizer, STAGES)
    assert scheduler.total_steps == 10
    assert first_group(run(optimizer, scheduler, 10)) == pytest.approx(RATES, abs=1e-15)
    assert scheduler.get_last_lr() == [0.0]


def test_dicts_from_yaml_give_the_same_schedule():
    optimizer = sgd()
    stages = json.loads('[{"steps": 6, "warmup_steps": 2, "lr": 0.01}, {"steps": 4, "warmup_steps": 2, "lr": 0.005}]')
    assert first_group(run(optimizer, StagedWarmup(optimizer, stages), 10)) == pytest.approx(RATES, abs=1e-15)


def test_groups_keep_their_ratio_under_an_absolute_lr_and_their_own_rate_under_scale():
    optimizer = sgd(0.1, 0.2, 0.0)
    scheduler = StagedWarmup(optimizer, [Stage(2, lr=0.01, shape="constant"), Stage(2, scale=0.5, shape="constant")])
    rates = run(optimizer, scheduler, 3)
    assert rates[1] == pytest.approx([0.01, 0.02, 0.0], abs=1e-15)
    assert rates[2] == pytest.approx([0.05, 0.1, 0.0], abs=1e-15)


def test_single_stage_options_describe_a_stage():
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, total_steps=10, warmup_fraction=0.2, power=2.0, decay_from="peak")
    assert scheduler.stages == (Stage(10, 2, power=2.0, decay_from="peak"),)
    expected = [0.5, 1.0] + [(1 - done / 8) ** 2 for done in range(9)]
    assert first_group(run(optimizer, scheduler, 10)) == pytest.approx(expected, abs=1e-15)


def test_a_group_added_later_follows_from_its_own_base_rate():
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, total_steps=10)
    run(optimizer, scheduler, 3)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
    rates = run(optimizer, scheduler, 3)
    assert rates[1:] == [pytest.approx([1 - t / 10, 4 * (1 - t / 10)]) for t in (4, 5, 6)]
    assert scheduler.base_lrs == [1.0, 4.0]
    assert optimizer.param_groups[1]["initial_lr"] == 4.0


def test_a_tensor_lr_is_filled_in_place():
    """A captured or compiled step holds on to the tensor, so it must stay the same object."""
    optimizer = sgd(0.5, tensor=True)
    held = optimizer.param_groups[0]["lr"]
    scheduler = StagedWarmup(optimizer, total_steps=4)
    assert first_group(run(optimizer, scheduler, 2)) == [0.5, 0.375, 0.25]
    assert optimizer.param_groups[0]["lr"] is held
    assert scheduler.base_lrs == [0.5]


def test_a_zero_wrapper_is_unwrapped():
    optimizer = sgd()
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert StagedWarmup(wrapper, STAGES).optimizer is optimizer


def test_something_else_is_still_refused_by_torch():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        StagedWarmup(object(), STAGES)


def test_the_usual_loop_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = sgd()
        run(optimizer, StagedWarmup(optimizer, STAGES), 10)


def test_a_schedule_that_is_over_before_the_training_says_so_once():
    optimizer = sgd()
    with pytest.warns(UserWarning, match=r"StagedWarmup ends after 10 optimizer steps.* stays at 0 x") as told:
        run(optimizer, StagedWarmup(optimizer, STAGES), 13)
    assert sum("StagedWarmup ends" in str(one.message) for one in told) == 1


@pytest.mark.parametrize("last_epoch", range(-1, 9))
def test_last_epoch_starts_in_the_middle(last_epoch: int):
    optimizer = sgd()
    optimizer.param_groups[0]["initial_lr"] = 0.01
    scheduler = StagedWarmup(optimizer, STAGES, last_epoch=last_epoch)
    assert first_group(run(optimizer, scheduler, 2)) == pytest.approx(
        ([*RATES, 0.0, 0.0])[last_epoch + 1 :][:3], abs=1e-15
    )


# ---- length known later


def test_without_a_length_the_rate_is_zero_until_it_is_set():
    optimizer = sgd()
    scheduler = StagedWarmup(optimizer, warmup_steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert scheduler.total_steps is None
    scheduler.set_total_steps(4)
    assert scheduler.total_steps == 4
    assert scheduler.get_last_lr() == [0.005]
    assert first_group(run(optimizer, scheduler, 4)) == pytest.approx([0.005, 0.01, 0.005, 0.0025, 0.0], abs=1e-15)


def test_a_tensor_lr_survives_a_late_length_in_place():
    optimizer = sgd(0.5, tensor=True)
    held = optimizer.param_groups[0]["lr"]
    StagedWarmup(optimizer).set_total_steps(4)
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == 0.5


def test_stepping_before_the_length_is_known_is_refused():
    optimizer = sgd()
    scheduler = StagedWarmup(optimizer)
    optimizer.step()
    with pytest.raises(PlanError, match=r"total_steps=None: StagedWarmup was stepped .* call set_total_steps\(n\)"):
        scheduler.step()


def test_the_length_may_be_set_twice_but_not_changed():
    scheduler = StagedWarmup(sgd(), warmup_fraction=0.5)
    scheduler.set_total_steps(10)
    scheduler.set_total_steps(10)
    with pytest.raises(PlanError) as error:
        scheduler.set_total_steps(12)
    assert "\ntotal_steps: 10 in the scheduler, 12 in set_total_steps" in str(error.value)
    assert "\nwarmup_steps: 5 in the scheduler, 6 in set_total_steps" in str(error.value)
    assert scheduler.total_steps == 10


def test_a_length_that_may_change_changes_when_adopting():
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, total_steps=10, on_plan_change="adopt")
    run(optimizer, scheduler, 4)
    scheduler.set_total_steps(20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1 - 4 / 20)


@pytest.mark.parametrize("on_plan_change", ["error", "adopt"])
def test_given_stages_must_add_up_to_the_training(on_plan_change: str):
    scheduler = StagedWarmup(sgd(), STAGES, on_plan_change=on_plan_change)
    scheduler.set_total_steps(10)
    with pytest.raises(PlanError, match="The stages add up to 10 optimizer steps, but the training has 12"):
        scheduler.set_total_steps(12)
    assert scheduler.stages == tuple(STAGES)


def test_a_warmup_longer_than_the_training_is_refused():
    with pytest.raises(PlanError, match="warmup_steps=11 is above total_steps=10"):
        StagedWarmup(sgd(), total_steps=10, warmup_steps=11)
    with pytest.raises(PlanError, match="warmup_steps=11 is above total_steps=10"):
        StagedWarmup(sgd(), warmup_steps=11).set_total_steps(10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, InvalidOptionError, "total_steps=0 must be a whole number of at least 1"),
        ({"total_steps": 10.5}, InvalidOptionError, "total_steps=10.5 must be a whole number"),
        ({"warmup_steps": -1}, InvalidOptionError, "warmup_steps=-1 must be a whole number of at least 0"),
        ({"warmup_fraction": 1.5}, InvalidOptionError, "warmup_fraction=1.5 must be a finite number of at least 0"),
        (
            {"warmup_fraction": 0.1, "warmup_steps": 3},
            InvalidOptionError,
            "warmup_steps=3 and warmup_fraction=0.1 both",
        ),
        ({"power": -1.0}, InvalidOptionError, "power=-1.0 must be a finite number above 0"),
        ({"shape": "linear"}, InvalidOptionError, "shape='linear' is not one of: poly, cosine, constant"),
        ({"power": 2.0, "shape": "cosine"}, InvalidOptionError, "power=2.0 has no effect with shape='cosine'"),
        ({"decay_from": "middle"}, InvalidOptionError, "decay_from='middle' is not one of: start, peak"),
        ({"on_plan_change": "ignore"}, InvalidOptionError, "on_plan_change='ignore' is not one of: error, adopt"),
        ({"stages": STAGES, "total_steps": 10}, InvalidOptionError, "stages and the options of a single stage"),
        ({"stages": STAGES, "warmup_steps": 1}, InvalidOptionError, "stages and the options of a single stage"),
        ({"stages": [{"steps": 4, "warmups": 1}]}, InvalidOptionError, "stages[0]: unknown key 'warmups'"),
        ({"stages": []}, PlanError, "stages=[] has no stage"),
    ],
)
def test_wrong_options_are_refused_before_the_optimizer_is_touched(options: dict, error: type, message: str):
    optimizer = sgd()
    with pytest.raises(error) as refused:
        StagedWarmup(optimizer, **options)
    assert message in str(refused.value)
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert "initial_lr" not in optimizer.param_groups[0]
