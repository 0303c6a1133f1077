"""Plans of one's own, growing batches, what a rank holds and sends, and both ways to print it all."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_lamb.errors import BatchSizeError, InvalidOptionError, PlanError
from lightning_lamb.footprint import PRECISIONS, STRATEGIES, held_bytes, sent_bytes
from lightning_lamb.plan import Plan, make_plan, plan_from_recipe
from lightning_lamb.recipes import RECIPES
from lightning_lamb.stages import Stage, multiplier

OWN = {
    "global_batch_size": 4096,
    "micro_batch_size": 64,
    "data_parallel_size": 8,
    "base_lr": 1e-3,
    "base_batch_size": 1024,
    "warmup_fraction": 0.05,
    "dataset_size": 1_000_000,
    "epochs": 10,
}


# ---- own plans


def test_an_own_plan_by_hand():
    plan = make_plan(**OWN)
    assert plan.lr == pytest.approx(2e-3)  # 4 times the batch, twice the rate
    assert plan.total_steps == 2442  # 10,000,000 / 4096 = 2441.4
    assert plan.warmup_steps == 488  # a fifth of them
    assert plan.accumulate_grad_batches == 8
    assert plan.global_batch_size == 4096
    assert plan.schedule_stages() == [Stage(2442, 488, lr=plan.lr)]


def test_the_base_batch_is_the_global_batch_unless_given():
    options = {name: value for name, value in OWN.items() if name != "base_batch_size"}
    plan = make_plan(**options)
    assert plan.lr == 1e-3
    assert plan.stages[0].warmup_fraction == 0.05


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, 10**6), st.integers(1, 1000))
def test_every_plan_multiplies_out(accumulate: int, micro: int, ranks: int, steps: int, base: int):
    batch = accumulate * micro * ranks
    plan = make_plan(
        global_batch_size=batch, micro_batch_size=micro, data_parallel_size=ranks, base_lr=1e-3, base_batch_size=base,
        total_steps=steps,
    )  # fmt: skip
    (stage,) = plan.stages
    assert stage.accumulate_grad_batches * stage.micro_batch_size * stage.data_parallel_size == plan.global_batch_size
    assert stage.samples == steps * batch
    assert plan.lr**2 * base == pytest.approx(1e-6 * batch)
    assert plan.warmup_steps == 0


def test_ways_to_treat_the_last_window_reach_the_plan():
    assert [make_plan(**OWN, last_window=way).total_steps for way in ("carry", "keep", "drop")] == [2442, 2450, 2440]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"epochs": None},
            InvalidOptionError,
            "unknown: epochs not given. Give dataset_size and epochs, or total_steps",
        ),
        ({"epochs": None, "dataset_size": None}, InvalidOptionError, "unknown: dataset_size and epochs not given"),
        ({"total_steps": 100}, InvalidOptionError, "total_steps=100 and dataset_size=1000000, epochs=10 both set"),
        ({"global_batch_size": 4000}, BatchSizeError, "Nearest that divide: 3584 or 4096"),
        ({"dataset_size": 1797}, BatchSizeError, "global_batch_size=4096 is larger than the dataset (1797 samples)"),
        ({"warmup_fraction": 0.5}, PlanError, "warmup_fraction=0.5 at batch 1024 becomes 2 at batch 4096"),
        ({"base_lr": -1.0}, InvalidOptionError, "base_lr=-1.0 must be a finite number above 0"),
        ({"lr_scaling": "log"}, InvalidOptionError, "lr_scaling='log' is not one of"),
        ({"epochs": math.nan}, InvalidOptionError, "epochs=nan must be a finite number above 0"),
        ({"micro_batch_size": 64.0}, InvalidOptionError, "micro_batch_size=64.0 must be a whole number"),
        ({"data_parallel_size": 0}, InvalidOptionError, "data_parallel_size=0 must be a whole number"),
        ({"doublings": -1}, InvalidOptionError, "doublings=-1 must be a whole number of at least 0"),
        ({"doublings": 5}, PlanError, "warmup_fraction=0.2 of the samples is longer than the first of 6 equal stages"),
        ({"precision": "fp8"}, InvalidOptionError, "precision='fp8' is not one of: 32-true"),
        ({"parameters": 0}, InvalidOptionError, "parameters=0 must be a whole number of at least 1"),
        ({"layers": 3}, InvalidOptionError, "layers=3 needs parameters"),
    ],
)
def test_wrong_input_is_refused_and_named(change: dict, error: type, message: str):
    with pytest.raises(error) as refused:
        make_plan(**{**OWN, **change})
    assert message in str(refused.value)


# ---- a batch that grows


def test_a_growing_batch_doubles_at_a_constant_rate():
    plan = make_plan(**{**OWN, "warmup_fraction": 0.0125}, doublings=2)
    assert [stage.global_batch_size for stage in plan.stages] == [4096, 8192, 16384]
    assert [stage.accumulate_grad_batches for stage in plan.stages] == [8, 16, 32]
    assert {stage.lr for stage in plan.stages} == {plan.lr}
    # A third of 10,000,000 samples each; the ramp is 5 % of the samples, all in the first stage.
    assert [stage.total_steps for stage in plan.stages] == [814, 407, 203]
    assert [stage.warmup_steps for stage in plan.stages] == [122, 0, 0]
    stages = plan.schedule_stages()
    assert stages == [Stage(1424, 122, lr=plan.lr, shape="constant")]
    rates = [multiplier(stages, step) for step in range(plan.total_steps)]
    assert rates[121:] == [1.0] * (plan.total_steps - 121)
    assert rates[0] == 1 / 122


@given(st.integers(1, 2000), st.integers(0, 5))
def test_growing_sees_the_same_samples_up_to_a_step_per_stage(steps: int, doublings: int):
    assume(steps >= (doublings + 1) * 2**doublings)
    options = {"micro_batch_size": 4, "data_parallel_size": 2, "base_lr": 0.1, "global_batch_size": 16}
    plan = make_plan(**options, total_steps=steps, doublings=doublings)
    seen = done = 0
    for stage in plan.stages:
        done += stage.total_steps
        seen += Fraction(16 * steps, doublings + 1) / stage.global_batch_size
        assert abs(done - seen) <= Fraction(1, 2)


def test_rounding_at_the_ends_of_stages_does_not_add_up():
    """1000 steps, twice doubled: the plan said 334, 167, 84 steps and a warm-up of 50, LargeBatch 333, 167, 83, 29."""
    options = {"micro_batch_size": 4, "data_parallel_size": 2, "base_lr": 0.1, "warmup_fraction": 0.05}
    plan = make_plan(**options, global_batch_size=64, total_steps=1000, doublings=2)
    assert [stage.total_steps for stage in plan.stages] == [333, 167, 83]
    assert plan.warmup_steps == 50  # of the samples of all stages, at the first one's batch


def test_stages_are_planned_as_large_batch_trains_them():
    options = {"micro_batch_size": 4, "data_parallel_size": 2, "base_lr": 0.1, "base_batch_size": 16}
    stages = [{"global_batch_size": 64, "share": 0.5, "warmup_steps": 3}, {"global_batch_size": 16, "share": 0.5}]
    by_samples = make_plan(**options, stages=stages, dataset_size=640, epochs=1)
    by_steps = make_plan(**options, stages=stages, total_steps=25)
    assert [stage.total_steps for stage in by_samples.stages] == [stage.total_steps for stage in by_steps.stages]
    assert by_samples.schedule_stages() == [Stage(5, 3, lr=0.2), Stage(20, 0, lr=0.1)]
    assert [stage.accumulate_grad_batches for stage in by_samples.stages] == [8, 2]
    with_steps = make_plan(**options, stages=[{"global_batch_size": 64, "steps": 4, "warmup_fraction": 0.5}])
    assert with_steps.schedule_stages() == [Stage(4, 2, lr=0.2)]
    assert with_steps.stages[0].warmup_fraction == 0.5
    with pytest.raises(PlanError, match="no effect on stages that give their steps"):
        make_plan(**options, stages=[{"global_batch_size": 64, "steps": 4}], dataset_size=640, epochs=1)


def test_a_warm_up_in_steps():
    plan = make_plan(**{**OWN, "warmup_fraction": 0.0}, warmup_steps=100)
    assert (plan.warmup_steps, plan.stages[0].warmup_fraction) == (100, 100 / 2442)
    with pytest.raises(PlanError, match="warmup_steps=3000 is above the 2442 optimizer steps"):
        make_plan(**{**OWN, "warmup_fraction": 0.0}, warmup_steps=3000)
    with pytest.raises(PlanError, match="warmup_steps=900 is above the stage's steps=814"):
        make_plan(**{**OWN, "warmup_fraction": 0.0}, warmup_steps=900, doublings=2)


# ---- what a rank holds


def test_bytes_held_for_bert_large_by_hand():
    """336,226,108 parameters: 16 bytes each in fp32; on 1024 ranks a share is 328,346 parameters."""
    held = held_bytes(336_226_108, 1024)
    weights, share = 4 * 336_226_108, 4 * 328_346
    assert {name: entry.total for name, entry in held.items()} == {
        "ddp": 4 * weights,
        "zero1": 2 * weights + 2 * share,
        "zero2": weights + 3 * share,
        "zero3": 4 * share,
    }


def test_half_precision_halves_weights_and_gradients_but_adds_masters():
    held = held_bytes(1000, 1, "bf16-true")["ddp"]
    assert (held.weights, held.gradients, held.master_weights, held.moments) == (2000, 2000, 4000, 8000)
    assert held_bytes(1000, 1, "bf16-mixed") == held_bytes(1000, 1, "32-true")


@given(st.integers(1, 10**12), st.integers(1, 4096), st.sampled_from(sorted(PRECISIONS)))
def test_more_sharding_never_holds_more_and_shares_add_up(parameters: int, ranks: int, precision: str):
    held = held_bytes(parameters, ranks, precision)
    totals = [held[name].total for name in STRATEGIES]
    assert totals == sorted(totals, reverse=True)
    assert 0 <= ranks * held["zero3"].total - 16 * parameters < 16 * ranks
    if ranks == 1:
        assert len(set(totals)) == 1


# ---- what a rank sends


def test_bytes_sent_by_hand():
    """1000 fp32 parameters in 5 layers on 4 ranks, 3 micro-batches: a ring sends 3/4 of 4000 bytes = 3000."""
    sent = sent_bytes(1000, 5, 4, 3)
    assert {name: (entry.gradients, entry.weights, entry.norms) for name, entry in sent.items()} == {
        "ddp": (6000, 0, 0),
        "zero1": (3000, 3000, 180),  # norms: 5 layers * 3 float64 * 3/4, there and back
        "zero2": (9000, 3000, 180),
        "zero3": (9000, 18000, 180),
    }
    assert sent["zero3"].total == 27180


@given(st.integers(1, 10**9), st.integers(1, 500), st.integers(1, 64), st.sampled_from(sorted(PRECISIONS)))
def test_one_rank_sends_nothing(parameters: int, layers: int, accumulate: int, precision: str):
    assert all(entry.total == 0 for entry in sent_bytes(parameters, layers, 1, accumulate, precision).values())


@given(st.integers(1000, 10**9), st.integers(1, 500), st.integers(2, 4096))
def test_the_norms_of_lamb_are_a_trifle(parameters: int, layers: int, ranks: int):
    assume(parameters >= 1000 * layers)
    sent = sent_bytes(parameters, layers, ranks)["zero1"]
    assert sent.norms <= 0.015 * sent.gradients


@pytest.mark.parametrize("option", ["parameters", "layers", "data_parallel_size", "accumulate_grad_batches"])
def test_sent_bytes_names_what_is_no_count(option: str):
    options = {"parameters": 10, "layers": 2, "data_parallel_size": 2, "accumulate_grad_batches": 1, option: 0}
    with pytest.raises(InvalidOptionError, match=f"{option}=0"):
        sent_bytes(**options)


# ---- printed


def every_plan() -> list[Plan]:
    recipes = [plan_from_recipe(name, micro_batch_size=8, data_parallel_size=4, base_lr=0.01) for name in RECIPES]
    return [*recipes, make_plan(**OWN), make_plan(**{**OWN, "warmup_fraction": 0.0}, doublings=3, parameters=10**9)]


@pytest.mark.parametrize("plan", every_plan(), ids=lambda plan: plan.recipe or f"own, {len(plan.stages)} stages")
def test_the_dict_is_json_and_says_what_the_plan_says(plan: Plan):
    read = json.loads(json.dumps(plan.to_dict()))
    for name in ("lr", "warmup_steps", "total_steps", "accumulate_grad_batches", "global_batch_size"):
        assert read[name] == getattr(plan, name)
    assert len(read["stages"]) == len(plan.stages) >= 1
    assert sum(stage["total_steps"] for stage in read["stages"]) == plan.total_steps
    assert [Stage(**stage) for stage in read["schedule"]] == plan.schedule_stages()
    if plan.parameters:
        assert read["memory_per_rank"]["ddp"]["total"] == 16 * plan.parameters
    if plan.layers:
        assert read["stages"][0]["bytes_sent_per_step"]["zero1"]["norms"] > 0


@pytest.mark.parametrize("plan", every_plan(), ids=lambda plan: plan.recipe or f"own, {len(plan.stages)} stages")
def test_the_table_fits_and_holds_every_number(plan: Plan):
    text = plan.table()
    assert max(map(len, text.splitlines())) <= 120
    for stage in plan.stages:
        for number in (stage.global_batch_size, stage.total_steps, stage.warmup_steps, stage.accumulate_grad_batches):
            assert f"{number:,}" in text
        assert f"{stage.lr:.6g}" in text
    assert f"{plan.total_steps:,}" in text
    assert ("Memory per rank" in text) == (plan.parameters is not None)
    assert ("Sent per rank" in text) == (plan.layers is not None)


def test_the_table_of_the_76_minute_run():
    text = plan_from_recipe("bert-large-mixed", micro_batch_size=[64, 16], data_parallel_size=512).table()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "stage 1 stage 2 total",
        "sequence length 128 512",
        "global batch (samples) 65,536 32,768",
        "x accumulate_grad_batches 2 4",
        "peak learning rate (sqrt) 0.00707107 0.005",
        "warm-up (optimizer steps) 2,815 312",
        "optimizer steps 7,037 1,562 8,599",
        "DDP 1.25 GiB 1.25 GiB - 2.51 GiB 5.01 GiB",
    ):
        assert line in lines
