"""`StagedWarmup` on optimizers: the pure function's rates, resumed at every step, in torch's compositions."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LambdaLR, SequentialLR

from lightning_lamb.errors import InvalidOptionError, PlanError, StateDictError
from lightning_lamb.schedules import Stage, StagedWarmup, multiplier
from lightning_lamb.stages import total_steps_of

STAGES = [Stage(6, 2, lr=0.01), Stage(4, 2, lr=0.005)]
# Worked out by hand, ten steps and the end.
RATES = [0.005, 0.01, 0.04 / 6, 0.03 / 6, 0.02 / 6, 0.01 / 6, 0.0025, 0.005, 0.0025, 0.00125, 0.0]


def sgd(*lrs: float, tensor: bool = False) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(lr, dtype=torch.float64) if tensor else lr}
        for lr in lrs or (0.01,)
    ]
    return torch.optim.SGD(groups)


def run(optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> list[list[float]]:
    """Take steps; return the rates that each of them (and then a further one) would use, per group."""
    used = []
    for _ in range(steps):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [*used, [float(group["lr"]) for group in optimizer.param_groups]]


def first_group(rates: list[list[float]]) -> list[float]:
    return [group_rates[0] for group_rates in rates]


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
        run(optimizer, StagedWarmup(optimizer, STAGES), 12)


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
    assert "stages[0].steps: 10 in the scheduler, 12 in set_total_steps" in str(error.value)
    assert "stages[0].warmup_steps: 5 in the scheduler, 6 in set_total_steps" in str(error.value)
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


# ---- resume


@st.composite
def drawn_stages(draw: st.DrawFn) -> list[Stage]:
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        steps = draw(st.integers(1, 6))
        lr = draw(st.none() | st.floats(0.0, 1.0))
        stages.append(Stage(steps, draw(st.integers(0, steps)), lr=lr, scale=1.0 if lr is not None else 0.5))
    return stages


@settings(max_examples=25, deadline=None)
@given(drawn_stages(), st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=3))
def test_resume_at_every_step_equals_the_uninterrupted_run_bit_for_bit(stages: list[Stage], lrs: list[float]):
    total = total_steps_of(stages) + 1
    optimizer = sgd(*lrs)
    whole = run(optimizer, StagedWarmup(optimizer, stages), total)
    for step in range(total + 1):
        before = sgd(*lrs)
        scheduler = StagedWarmup(before, stages)
        run(before, scheduler, step)
        stored = io.BytesIO()
        torch.save({"optimizer": before.state_dict(), "scheduler": scheduler.state_dict()}, stored)
        stored.seek(0)
        checkpoint = torch.load(stored, weights_only=True)
        after = sgd(*lrs)
        resumed = StagedWarmup(after, stages)
        after.load_state_dict(checkpoint["optimizer"])
        resumed.load_state_dict(checkpoint["scheduler"])
        assert resumed.get_last_lr() == whole[step]
        assert run(after, resumed, total - step) == whole[step:]


def test_the_state_is_made_of_json_primitives():
    scheduler = StagedWarmup(sgd(0.5, tensor=True), [Stage(4, 2)])
    state = scheduler.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["stages"][0]["warmup_steps"] == 2
    assert state["base_lrs"] == [0.5]


def resumed_under(old: list[Stage] | None, new: list[Stage], steps: int, **options: str) -> StagedWarmup:
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, old)
    run(optimizer, scheduler, steps)
    after = sgd(1.0)
    resumed = StagedWarmup(after, new, **options)
    after.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    return resumed


def test_a_changed_plan_is_refused_with_the_difference_and_nothing_is_loaded():
    optimizer = sgd(1.0)
    checkpoint = StagedWarmup(sgd(1.0), [Stage(6, 2), Stage(4)]).state_dict()
    scheduler = StagedWarmup(optimizer, [Stage(8, 2), Stage(4, lr=0.5)])
    run(optimizer, scheduler, 3)
    before = scheduler.state_dict()
    with pytest.raises(PlanError) as error:
        scheduler.load_state_dict(checkpoint)
    assert str(error.value).splitlines()[1:3] == [
        "stages[0].steps: 6 in the checkpoint, 8 in this run",
        "stages[1].lr: None in the checkpoint, 0.5 in this run",
    ]
    assert 'on_plan_change="adopt"' in str(error.value)
    assert scheduler.state_dict() == before


def test_adopting_keeps_the_step_and_follows_the_new_plan_at_once():
    resumed = resumed_under([Stage(10)], [Stage(20)], 4, on_plan_change="adopt")
    assert resumed.last_epoch == 4
    assert resumed.total_steps == 20
    assert resumed.optimizer.param_groups[0]["lr"] == resumed.get_last_lr()[0] == pytest.approx(1 - 4 / 20)


def test_re_warm_up_after_a_resume_lists_the_part_already_done_as_the_first_stage():
    resumed = resumed_under([Stage(10)], [Stage(4), Stage(8, 4, scale=2.0)], 4, on_plan_change="adopt")
    rates = first_group(run(resumed.optimizer, resumed, 4))
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0 * (1 - 4 / 8)])


def test_a_scheduler_without_a_length_takes_the_checkpoints_plan_and_then_checks_the_length():
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, total_steps=10)
    run(optimizer, scheduler, 4)
    resumed = StagedWarmup(sgd(1.0))
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.total_steps == 10
    resumed.set_total_steps(10)
    with pytest.raises(PlanError, match="10 in the scheduler, 12 in set_total_steps"):
        resumed.set_total_steps(12)


def test_a_checkpoint_without_a_length_leaves_this_runs_plan():
    resumed = StagedWarmup(sgd(1.0), total_steps=10)
    resumed.load_state_dict(StagedWarmup(sgd(1.0)).state_dict())
    assert resumed.total_steps == 10


def test_the_state_of_another_scheduler_is_refused():
    state = LambdaLR(sgd(), lambda step: 1.0).state_dict()
    scheduler = StagedWarmup(sgd(), STAGES)
    before = scheduler.state_dict()
    with pytest.raises(StateDictError, match="no state of StagedWarmup: it has no stages"):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


def test_a_group_added_before_and_after_loading():
    """The checkpoint has two groups; the new run adds its second one before or after loading the scheduler."""
    optimizer = sgd(1.0)
    scheduler = StagedWarmup(optimizer, total_steps=10)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
    run(optimizer, scheduler, 3)
    for order in ("before", "after"):
        late = sgd(1.0)
        resumed = StagedWarmup(late, total_steps=10)
        if order == "after":
            resumed.load_state_dict(scheduler.state_dict())
        late.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 4.0})
        if order == "before":
            resumed.load_state_dict(scheduler.state_dict())
        late.load_state_dict(optimizer.state_dict())
        assert run(late, resumed, 2) == [pytest.approx([1 - t / 10, 4 * (1 - t / 10)]) for t in (3, 4, 5)]


def test_pickling_a_running_scheduler():
    optimizer = sgd()
    scheduler = StagedWarmup(optimizer, STAGES)
    run(optimizer, scheduler, 3)
    copy = pickle.loads(pickle.dumps(scheduler))
    assert copy.stages == scheduler.stages
    copy.optimizer.step()
    copy.step()
    assert copy.get_last_lr() == pytest.approx([RATES[4]])


# ---- inside torch's schedulers: whatever LambdaLR does there, StagedWarmup does


def lambda_twin(optimizer: torch.optim.Optimizer) -> LambdaLR:
    stages = [Stage(4, 2), Stage(3, 1)]
    return LambdaLR(optimizer, lambda step: multiplier(stages, step))


def staged(optimizer: torch.optim.Optimizer) -> StagedWarmup:
    return StagedWarmup(optimizer, [Stage(4, 2), Stage(3, 1)])


COMPOSITIONS = {
    "alone": lambda make, o: make(o),
    "first of a sequence": lambda make, o: SequentialLR(o, [make(o), ConstantLR(o, 0.5, 2)], [4]),
    "second of a sequence": lambda make, o: SequentialLR(o, [ConstantLR(o, 0.5, 9), make(o)], [3]),
    "before a chained decay": lambda make, o: ChainedScheduler([make(o), ExponentialLR(o, 0.9)]),
    "after a chained decay": lambda make, o: ChainedScheduler([ExponentialLR(o, 0.9), make(o)]),
}


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=list(COMPOSITIONS))
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_composed_it_behaves_like_lambda_lr(composition, tensor: bool):
    rates = []
    for make in (lambda_twin, staged):
        optimizer = sgd(0.5, 0.25, tensor=tensor)
        rates.append(run(optimizer, composition(make, optimizer), 8))
    assert rates[1] == [pytest.approx(row, abs=1e-15) for row in rates[0]]
    assert len({row[0] for row in rates[0]}) >= 3  # the comparison is about something


@pytest.mark.parametrize("composition", COMPOSITIONS.values(), ids=list(COMPOSITIONS))
def test_composed_it_resumes_at_every_step(composition):
    optimizer = sgd(0.5)
    whole = run(optimizer, composition(staged, optimizer), 8)
    for step in range(8):
        before = sgd(0.5)
        scheduler = composition(staged, before)
        run(before, scheduler, step)
        after = sgd(0.5)
        resumed = composition(staged, after)
        after.load_state_dict(before.state_dict())
        resumed.load_state_dict(scheduler.state_dict())
        assert run(after, resumed, 8 - step) == whole[step:]


def test_adopting_while_a_sibling_is_in_charge_leaves_its_rate_alone():
    def sequence(optimizer: torch.optim.Optimizer, stage: Stage) -> SequentialLR:
        warm = StagedWarmup(optimizer, [stage], on_plan_change="adopt")
        return SequentialLR(optimizer, [warm, ConstantLR(optimizer, 0.3, 9)], [2])

    before, after = sgd(1.0), sgd(1.0)
    scheduler = sequence(before, Stage(10))
    run(before, scheduler, 4)
    resumed = sequence(after, Stage(20))
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert after.param_groups[0]["lr"] == before.param_groups[0]["lr"] == pytest.approx(0.3)
