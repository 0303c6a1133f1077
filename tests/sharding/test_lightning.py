"""Lightning's Trainer in every layout: whoever builds the optimizer, clipped or not, in every precision.

One training per job: two epochs, 12 optimizer steps of one global batch that LargeBatch makes of micro-batches. However
the network is laid out, it drifts from float64 as one process does in the same precision.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from sharding.lightning_jobs import STEPS, Job, Result, run_job
from sharding.networks import drifts

TITLES = {
    "ddp": "DDP",
    "zero1": "DDP, ShardedStateOptimizer (ZeRO-1)",
    "fsdp1": "FSDP1 FULL_SHARD",
    "fsdp1_grad_op": "FSDP1 SHARD_GRAD_OP",
    "fsdp1_hybrid": "FSDP1 HYBRID_SHARD",
    "fsdp2": "FSDP2",
    "hsdp": "HSDP (FSDP2 on a 2-D mesh)",
    "tp": "tensor parallel",
    "fsdp2_tp": "FSDP2 with tensor parallel",
}
ON_TWO = ["ddp", "zero1", "fsdp1", "fsdp1_grad_op", "fsdp2", "tp"]
ON_FOUR = ["fsdp1_hybrid", "hsdp", "fsdp2_tp"]

KINDS: dict[str, dict[str, Any]] = {
    "Trainer, 32-true": {},
    "Trainer, bf16-mixed": {"trainer": (("precision", "bf16-mixed"),)},
    "Trainer, bf16-true": {"trainer": (("precision", "bf16-true"),)},
    "Trainer(gradient_clip_val)": {"trainer": (("gradient_clip_val", 0.5),)},
    "optimizer built before wrapping, LargeBatch": {"extra": ("stock",)},
}


def jobs() -> list[Any]:
    found = []
    for layout, ranks in [*((name, 2) for name in ON_TWO), *((name, 4) for name in ON_FOUR)]:
        for kind, options in KINDS.items():
            if layout == "zero1" and "stock" in options.get("extra", ()):
                continue  # ShardedStateOptimizer is what the mixin or LambCLI builds
            marks = [pytest.mark.shows(TITLES[layout], kind, "exact")]
            often = ranks == 2 or kind in ("Trainer, 32-true", "Trainer(gradient_clip_val)")
            marks += [] if often else [pytest.mark.slow]
            found.append(pytest.param(Job(layout, ranks, **options), id=f"{TITLES[layout]}, {kind}", marks=marks))
    return found


@functools.cache
def alone(*trainer: tuple[str, Any]) -> Result:
    """The same training on one process."""
    return run_job(Job("single", 1, trainer=trainer))


def precision_of(job: Job) -> str:
    return dict(job.trainer).get("precision", "32-true")


def assert_drifts_like_one_process(job: Job, result: Result) -> None:
    clip = [option for option in job.trainer if option[0] == "gradient_clip_val"]
    exact = alone(("precision", "64-true"), *clip).weights
    allowed = drifts(alone(("precision", precision_of(job)), *clip).weights, exact)
    found = drifts(result.weights, exact)
    assert {kind: value for kind, value in found.items() if value > 2 * allowed[kind]} == {}, (found, allowed)


@pytest.mark.parametrize("job", jobs())
def test_it_drifts_no_further_than_twice_one_process(job, fits):
    for result in fits.of(job):
        assert not result.failure, result.failure
        assert (result.optimizer_steps, result.schedule_steps) == (STEPS, STEPS)
        assert result.rates == pytest.approx(alone().rates, rel=1e-12)
        assert_drifts_like_one_process(job, result)


@pytest.mark.parametrize("job", jobs())
def test_all_ranks_agree(job, fits):
    first, *others = fits.of(job)
    for other in others:
        assert first.weights.keys() == other.weights.keys()
        assert all(torch.equal(value, other.weights[name]) for name, value in first.weights.items())


@pytest.mark.parametrize("job", [p for p in jobs() if precision_of(p.values[0]) == "bf16-true"])
def test_in_bf16_true_masters_and_moments_are_float32(job, fits):
    for result in fits.of(job):
        kinds = {(name.split()[1], value.dtype) for name, value in result.local.items()}
        state = {"step", "exp_avg", "exp_avg_sq", "master_weight"}
        assert kinds == {("weight", torch.bfloat16), *((key, torch.float32) for key in state)}


def test_the_trainers_clip_norm_matters():
    """So that the tests above can fail."""
    clipped = alone(("gradient_clip_val", 0.5)).weights
    assert drifts(clipped, alone().weights)["others"] > 0.05


# ---- an optimizer that nobody repairs


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(
            Job("fsdp2", 2, extra=("stock", "bare")), marks=pytest.mark.shows("FSDP2", "bare stock", "refused")
        ),
        pytest.param(
            Job("fsdp2_tp", 4, extra=("stock", "bare")),
            marks=pytest.mark.shows("FSDP2 with tensor parallel", "bare stock", "refused"),
        ),
    ],
    ids=str,
)
def test_an_optimizer_of_replaced_parameters_is_an_error_without_large_batch(job, fits):
    for result in fits.of(job):
        assert "UnknownShardError: Lamb.step() found no gradient on any of its 12 parameters" in result.failure
        assert "LargeBatch" in result.failure


# ---- steps that a GradScaler skips

SCALED = {
    layout: Job(layout, 2, extra=("scaler",), module=(("overflow_at", 9),)) for layout in ("ddp", "zero1", "fsdp1")
}


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(job, id=TITLES[layout], marks=pytest.mark.shows(TITLES[layout], "GradScaler", "exact"))
        for layout, job in SCALED.items()
    ],
)
def test_all_ranks_skip_together_and_the_schedule_waits(job, fits):
    """The loss of the last rank is infinite in one window of each epoch."""
    first, *others = fits.of(job)
    for result in (first, *others):
        assert not result.failure, result.failure
        assert (result.optimizer_steps, result.schedule_steps) == (STEPS - 2, STEPS - 2)
        # Rates before each attempt: that of the skipped step comes again. Its window is the third of six.
        assert result.rates[2] == result.rates[3]
        assert result.rates[8] == result.rates[9]
        assert len(set(result.rates)) == STEPS - 2
        assert all(torch.equal(value, result.weights[name]) for name, value in first.weights.items())
        assert all(value.isfinite().all() for value in result.weights.values())


# ---- DeferredGradientSync

EAGER = Job("fsdp2", 2, extra=("count",))
DEFERRED = Job("fsdp2", 2, extra=("count", "defer"))
DEFERRED_ON_FOUR = [
    pytest.param(Job(layout, 4, extra=("count", "defer")), marks=pytest.mark.slow) for layout in ("hsdp", "fsdp2_tp")
]


@pytest.mark.parametrize("job", [EAGER, DEFERRED, *DEFERRED_ON_FOUR], ids=str)
def test_deferred_gradients_are_the_same_gradients(job, fits):
    for result in fits.of(job):
        assert not result.failure, result.failure
        assert_drifts_like_one_process(job, result)
        # Two units of FSDP2; windows of 4 micro-batches on 2 ranks.
        assert result.collectives["_reduce_scatter_base_"] == (8 if job == EAGER else 2)


@pytest.mark.parametrize("job", [Job("ddp", 2, extra=("defer",)), Job("fsdp1", 2, extra=("defer",))], ids=str)
def test_where_lightning_defers_itself_the_callback_is_refused(job, fits):
    for result in fits.of(job):
        assert "ConflictError: DeferredGradientSync is for FSDP2" in result.failure


# ---- CPUFSDPStrategy


FULL_ON_CPU = Job("fsdp1", 2, strategy=(("state_dict_type", "full"),))
INVISIBLE = Job("fsdp1", 2, strategy=(("use_orig_params", False),))


@pytest.mark.parametrize("job", [FULL_ON_CPU, INVISIBLE], ids=["full checkpoints", "invisible layers"])
def test_the_cpu_strategy_refuses(job, fits):
    expected = {
        FULL_ON_CPU: ["ConflictError", 'state_dict_type="sharded"'],
        INVISIBLE: ["UnknownShardError", "use_orig_params=True"],
    }
    for result in fits.of(job):
        assert all(words in result.failure for words in expected[job]), result.failure
