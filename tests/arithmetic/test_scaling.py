"""Batch, learning-rate and warm-up rules, against numbers worked out by hand and against their own algebra."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lightning_lamb.errors import BatchSizeError, InvalidOptionError, PlanError
from lightning_lamb.scaling import (
    accumulate_grad_batches,
    by_world_size,
    nearest_global_batch_sizes,
    scaled_lr,
    scaled_warmup_fraction,
    steps_of_epochs,
    steps_of_samples,
    steps_per_epoch,
    warmup_steps,
)

counts = st.integers(1, 5000)
batches = st.integers(1, 200_000)
rates = st.floats(1e-6, 10.0)


# ---- accumulation


@given(counts, counts, counts)
def test_accumulation_is_the_inverse_of_the_product(accumulate: int, micro: int, ranks: int):
    assert accumulate_grad_batches(accumulate * micro * ranks, micro, ranks) == accumulate


@given(batches, st.integers(1, 300), st.integers(1, 300))
def test_the_listed_batches_divide_and_none_lies_between(batch: int, micro: int, ranks: int):
    assume(batch % (micro * ranks))
    nearest = nearest_global_batch_sizes(batch, micro, ranks)
    for size in nearest:
        assert size == accumulate_grad_batches(size, micro, ranks) * micro * ranks
    assert max(nearest) > batch
    if len(nearest) == 2:
        assert min(nearest) < batch
        assert max(nearest) - min(nearest) == micro * ranks
    else:
        assert batch < micro * ranks
    with pytest.raises(BatchSizeError) as error:
        accumulate_grad_batches(batch, micro, ranks)
    for size in nearest:
        assert str(size) in str(error.value)


@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 20))
def test_the_proposed_micro_batch_is_the_largest_that_works(per_rank: int, micro: int, ranks: int):
    assume(per_rank % micro)
    with pytest.raises(BatchSizeError) as error:
        accumulate_grad_batches(per_rank * ranks, micro, ranks)
    proposed = int(str(error.value).split("with micro_batch_size=")[1].rstrip("."))
    assert proposed == max(size for size in range(1, micro + 1) if per_rank % size == 0)


def test_the_message_of_a_batch_that_does_not_divide():
    with pytest.raises(BatchSizeError) as error:
        accumulate_grad_batches(1000, 32, 8)
    assert str(error.value) == (
        "global_batch_size=1000 is not a multiple of micro_batch_size * data_parallel_size = 32 * 8 = 256. "
        "Nearest that divide: 768 or 1024. Or keep 1000 with micro_batch_size=25."
    )


def test_a_batch_below_one_window_lists_only_the_one_above():
    with pytest.raises(BatchSizeError, match=r"Nearest that divide: 256\. Or keep 8 with micro_batch_size=1\."):
        accumulate_grad_batches(8, 32, 8)
    with pytest.raises(BatchSizeError, match=r"Nearest that divide: 256\.$"):
        accumulate_grad_batches(7, 32, 8)


@pytest.mark.parametrize("option", ["global_batch_size", "micro_batch_size", "data_parallel_size"])
@pytest.mark.parametrize("value", [0, -8, 8.0, math.nan, "8", None, True])
def test_accumulation_refuses_what_is_no_count(option: str, value: object):
    sizes = {"global_batch_size": 64, "micro_batch_size": 8, "data_parallel_size": 2, option: value}
    with pytest.raises(InvalidOptionError, match=f"^{option}={value!r} must be a whole number of at least 1.$"):
        accumulate_grad_batches(**sizes)


def test_numpy_integers_are_counts():
    assert accumulate_grad_batches(np.int64(64), np.int32(8), 2) == 4


# ---- learning rate


@given(rates, batches, batches, batches, st.sampled_from(["sqrt", "linear", "none"]))
def test_scaling_in_two_steps_is_scaling_in_one(lr: float, first: int, second: int, third: int, rule: str):
    through = scaled_lr(scaled_lr(lr, first, second, rule), second, third, rule)
    assert through == pytest.approx(scaled_lr(lr, first, third, rule), rel=1e-12)


@given(rates, batches, st.integers(1, 64))
def test_what_each_rule_does_to_a_larger_batch(lr: float, batch: int, factor: int):
    assert scaled_lr(lr, batch, factor**2 * batch) == pytest.approx(factor * lr, rel=1e-12)
    assert scaled_lr(lr, batch, factor * batch, "linear") == pytest.approx(factor * lr, rel=1e-12)
    assert scaled_lr(lr, batch, factor * batch, "none") == lr


@pytest.mark.parametrize("lr", [0.0, -1e-3, math.nan, math.inf, None, True])
def test_a_base_lr_that_is_none_is_refused(lr: object):
    with pytest.raises(InvalidOptionError, match=r"^base_lr=.* must be a finite number above 0"):
        scaled_lr(lr, 512, 512)


def test_text_from_yaml_is_refused_with_the_way_to_write_it():
    with pytest.raises(InvalidOptionError, match=r"base_lr='1e-6' is text.* Write 1\.0e-06 without quotes"):
        scaled_lr("1e-6", 512, 512)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InvalidOptionError, match="lr_scaling='cubic' is not one of: sqrt, linear, none"):
        scaled_lr(1e-3, 512, 512, "cubic")


# ---- warm-up


@given(st.floats(0.0, 1.0), batches, batches)
def test_the_warmup_share_grows_with_the_batch_or_is_refused(fraction: float, base: int, batch: int):
    exact = Fraction(fraction) * batch / base
    if exact > Fraction(1_000_001, 1_000_000):
        with pytest.raises(PlanError, match="longer than the training"):
            scaled_warmup_fraction(fraction, base, batch)
    elif exact < Fraction(999_999, 1_000_000):
        assert scaled_warmup_fraction(fraction, base, batch) == pytest.approx(float(exact), rel=1e-12)


def test_the_refusal_names_the_largest_batch():
    with pytest.raises(PlanError) as error:
        scaled_warmup_fraction(0.2, 32768, 262144)
    assert "warmup_fraction=0.2 at batch 32768 becomes 1.6 at batch 262144" in str(error.value)
    assert "largest batch for it is 163840" in str(error.value)
    assert scaled_warmup_fraction(0.2, 32768, 163840) == 1.0


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, "a tenth", None])
def test_a_warmup_share_outside_0_to_1_is_refused(fraction: object):
    with pytest.raises(InvalidOptionError, match=r"^warmup_fraction="):
        scaled_warmup_fraction(fraction, 1, 1)
    with pytest.raises(InvalidOptionError, match=r"^warmup_fraction="):
        warmup_steps(fraction, 100)


@given(st.floats(0.0, 1.0), st.integers(1, 10**7))
def test_warmup_steps_are_the_nearest_whole_number(fraction: float, total: int):
    steps = warmup_steps(fraction, total)
    assert 0 <= steps <= total
    assert abs(steps - fraction * total) <= 0.5 + 1e-9 * total


@given(st.integers(1, 1000).map(lambda k: 64 * k), st.integers(1, 8))
def test_linear_epoch_warmup_takes_the_same_steps_at_every_batch(samples: int, doublings: int):
    """Twice the batch: half the steps in all, twice their share."""
    few, many = steps_of_samples(512 * samples, 512), steps_of_samples(512 * samples, 1024)
    fraction = 1 / 2**doublings
    assert warmup_steps(scaled_warmup_fraction(fraction / 2, 512, 1024), many) == warmup_steps(fraction / 2, few)


# ---- steps


@given(st.integers(1, 10**9), batches)
def test_steps_of_samples_are_enough_and_not_one_too_many(samples: int, batch: int):
    steps = steps_of_samples(samples, batch)
    assert steps * batch >= samples > (steps - 1) * batch


@given(st.integers(1, 20_000), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_an_epoch_has_the_steps_that_a_trainer_takes(dataset: int, micro: int, ranks: int, accumulate: int):
    """Independent count: samples to ranks (padded), to micro-batches, to windows, each time rounded up."""
    batch = micro * ranks * accumulate
    assume(batch <= dataset)
    per_rank = math.ceil(dataset / ranks)
    micro_batches = math.ceil(per_rank / micro)
    assert steps_per_epoch(dataset, batch) == math.ceil(micro_batches / accumulate)
    assert steps_per_epoch(dataset, batch, drop_last=True) == dataset // batch


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(BatchSizeError, match=r"global_batch_size=2048 is larger than the dataset \(1797 samples\)"):
        steps_per_epoch(1797, 2048)
    with pytest.raises(BatchSizeError, match="at most 1797"):
        steps_of_epochs(1797, 10, 2048)


def test_three_ways_to_treat_the_last_window_of_cifar10():
    # 50000 / 512 = 97.66 batches; 24 epochs of it are 2343.75
    assert steps_of_epochs(50_000, 24, 512) == 2344
    assert steps_of_epochs(50_000, 24, 512, last_window="keep") == 24 * 98
    assert steps_of_epochs(50_000, 24, 512, last_window="drop") == 24 * 97


@given(st.integers(1, 10**6), st.integers(1, 200), st.integers(1, 1000))
def test_carry_sees_every_sample_and_lies_between_drop_and_keep(dataset: int, epochs: int, batch: int):
    assume(batch <= dataset)
    carry = steps_of_epochs(dataset, epochs, batch)
    assert carry == steps_of_samples(dataset * epochs, batch)
    assert steps_of_epochs(dataset, epochs, batch, last_window="drop") <= carry
    assert carry <= steps_of_epochs(dataset, epochs, batch, last_window="keep")


def test_part_of_an_epoch_is_exact_in_decimals():
    """0.1 in binary is a little more than a tenth, which must not become one more step."""
    assert steps_of_epochs(1000, 0.1, 10) == 10
    assert steps_of_epochs(1000, 1.5, 10) == 150


@pytest.mark.parametrize("way", ["keep", "drop"])
def test_part_of_an_epoch_needs_carried_samples(way: str):
    with pytest.raises(InvalidOptionError, match=r"epochs=1.5 must be a whole number"):
        steps_of_epochs(1000, 1.5, 10, last_window=way)


def test_an_unknown_way_and_wrong_epochs_are_refused():
    with pytest.raises(InvalidOptionError, match="last_window='pad' is not one of: carry, keep, drop"):
        steps_of_epochs(1000, 1, 10, last_window="pad")
    for epochs in (0, -1, math.nan, math.inf):
        with pytest.raises(InvalidOptionError, match=r"^epochs="):
            steps_of_epochs(1000, epochs, 10)


# ---- ranks


@given(rates, st.integers(0, 500), st.integers(500, 10**6), st.integers(1, 64))
def test_more_ranks_keep_the_samples_seen_and_the_warmup_steps(lr: float, ramp: int, total: int, factor: int):
    assume(ramp * factor <= total)
    run = by_world_size(lr=lr, warmup_steps=ramp, total_steps=total, from_size=1, to_size=factor)
    assert run.total_steps * factor >= total > (run.total_steps - 1) * factor
    assert run.lr == pytest.approx(lr * math.sqrt(factor))
    assert run.warmup_steps == ramp


def test_one_to_eight_gpus_and_back():
    eight = by_world_size(lr=1e-3, warmup_steps=100, total_steps=8000, from_size=1, to_size=8)
    assert eight == (pytest.approx(2.8284271e-3), 100, 1000)
    one = by_world_size(**eight._asdict(), from_size=8, to_size=1)
    assert one == (pytest.approx(1e-3), 100, 8000)
    assert by_world_size(**eight._asdict(), from_size=8, to_size=4, lr_scaling="linear").lr == pytest.approx(
        1.4142135e-3
    )


def test_too_many_ranks_for_the_warmup_are_refused():
    with pytest.raises(PlanError, match="warmup_steps=100 is above the total of 63 steps that 1000 steps on 1 ranks"):
        by_world_size(lr=1e-3, warmup_steps=100, total_steps=1000, from_size=1, to_size=16)
