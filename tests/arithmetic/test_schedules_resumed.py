"""`StagedWarmup` resumed at every step, pickled, inside torch's schedulers, and from a command line."""

from __future__ import annotations

import io
import json
import pickle

import jsonargparse
import pytest
import torch
from arithmetic.schedule_runs import RATES, STAGES, first_group, run, sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    ExponentialLR,
    LambdaLR,
    LRScheduler,
    SequentialLR,
)

from lightning_lamb.errors import PlanError, StateDictError
from lightning_lamb.schedules import Stage, StagedWarmup, multiplier
from lightning_lamb.stages import total_steps_of

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


@pytest.mark.parametrize("composition", COMPOSITIONS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
def test_composed_it_behaves_like_lambda_lr(composition: str, tensor: bool):
    if tensor and "sequence" in composition and torch.__version__.startswith("2.9."):
        pytest.skip("torch 2.9's SequentialLR gives other rates for a tensor than for a float, of LambdaLR too")
    rates = []
    for make in (lambda_twin, staged):
        optimizer = sgd(0.5, 0.25, tensor=tensor)
        rates.append(run(optimizer, COMPOSITIONS[composition](make, optimizer), 8))
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


# ---- from a command line, as LightningCLI parses it


def scheduler_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LRScheduler, "lr_scheduler", skip={"optimizer"}, instantiate=False)
    return parser


def test_stages_survive_the_command_line_and_a_yaml_round_trip():
    parser = scheduler_parser()
    stages = '[{"steps": 6, "warmup_steps": 2, "lr": 0.01}, {"steps": 4, "warmup_steps": 2, "lr": 0.005}]'
    options = ["--lr_scheduler=lightning_lamb.StagedWarmup", f"--lr_scheduler.stages={stages}"]
    read = parser.parse_string(parser.dump(parser.parse_args(options)))
    scheduler = StagedWarmup(sgd(), **read.lr_scheduler.init_args.as_dict())
    assert scheduler.stages == tuple(STAGES)


def test_every_option_is_explained_on_the_command_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises((SystemExit, jsonargparse.ArgumentError)):
        scheduler_parser().parse_args(["--lr_scheduler.help=lightning_lamb.StagedWarmup"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("A list of stages, each with steps", "The ramp as a share of the total steps", "refuse and show"):
        assert words in text
