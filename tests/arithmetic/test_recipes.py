"""Every row that the paper's tables print must come out of the plan.

The rows are typed in here again, as decimal numbers, so that a wrong number in the recipes does not vouch for itself.
"""

from __future__ import annotations

import math

import pytest

from lightning_lamb.errors import BatchSizeError, InvalidOptionError, PlanError
from lightning_lamb.plan import plan_from_recipe
from lightning_lamb.recipes import BERT_LARGE, RECIPES, Recipe, recipe_named

# arXiv 1904.00962v5, Table 1 (steps) and Table 4 (learning rate, warm-up ratio as 1/n).
BERT_ROWS = [
    (512, 1_000_000, 0.000625, 320),
    (1024, 500_000, 0.00088388348, 160),
    (2048, 250_000, 0.00125, 80),
    (4096, 125_000, 0.0017677670, 40),
    (8192, 62_500, 0.0025, 20),
    (16384, 31_250, 0.0035355339, 10),
    (32768, 15_625, 0.005, 5),
]
# Table 5: learning rate, warm-up epochs of 90.
RESNET_ROWS = [
    (512, 0.005, 0.3125),
    (1024, 0.0070710678, 0.625),
    (2048, 0.01, 1.25),
    (4096, 0.014142136, 2.5),
    (8192, 0.02, 5.0),
    (16384, 0.028284271, 10.0),
    (32768, 0.04, 20.0),
]


@pytest.mark.parametrize(("batch", "steps", "lr", "nth"), BERT_ROWS)
def test_bert_large_rows_of_tables_1_and_4(batch: int, steps: int, lr: float, nth: int):
    plan = plan_from_recipe("bert-large", global_batch_size=batch, micro_batch_size=8, data_parallel_size=16)
    assert plan.total_steps == steps
    assert plan.lr == pytest.approx(lr, rel=1e-7)
    assert plan.stages[0].warmup_fraction == pytest.approx(1 / nth, rel=1e-12)
    assert plan.warmup_steps == steps / nth == 3125  # linear-epoch warm-up: the same steps at every batch
    assert plan.accumulate_grad_batches * 8 * 16 == batch


def test_bert_large_at_32k_switches_length_after_14063_steps_without_restarting():
    plan = plan_from_recipe("bert-large", micro_batch_size=8, data_parallel_size=16)
    assert [(stage.total_steps, stage.sequence_length) for stage in plan.stages] == [(14063, 128), (1562, 512)]
    (schedule,) = plan.schedule_stages()
    assert (schedule.steps, schedule.warmup_steps, schedule.lr) == (15625, 3125, 0.005)


def test_bert_large_mixed_takes_8599_steps_and_warms_up_twice():
    plan = plan_from_recipe("bert-large-mixed", micro_batch_size=8, data_parallel_size=16)
    assert plan.total_steps == 8599
    assert [stage.total_steps for stage in plan.stages] == [7037, 1562]
    assert [stage.global_batch_size for stage in plan.stages] == [65536, 32768]
    assert [stage.sequence_length for stage in plan.stages] == [128, 512]
    assert [stage.restarts_schedule for stage in plan.stages] == [True, True]
    # Derived, not printed: Table 4's row 32K by the square-root and the linear-epoch rule.
    assert [stage.lr for stage in plan.stages] == pytest.approx([0.005 * math.sqrt(2), 0.005], rel=1e-12)
    assert [stage.warmup_steps for stage in plan.stages] == [2815, 312]
    assert "derived" in plan.sources["base_lr"]
    first, second = plan.schedule_stages()
    assert (first.steps, first.warmup_steps, second.steps, second.warmup_steps) == (7037, 2815, 1562, 312)


def test_bert_large_mixed_scales_both_stages():
    plan = plan_from_recipe("bert-large-mixed", global_batch_size=8192, micro_batch_size=8, data_parallel_size=16)
    assert [stage.global_batch_size for stage in plan.stages] == [8192, 4096]
    assert [stage.total_steps for stage in plan.stages] == [8 * 7037, 8 * 1562]
    assert [stage.lr for stage in plan.stages] == pytest.approx([0.0025, 0.0017677670], rel=1e-7)
    assert [stage.warmup_steps for stage in plan.stages] == [2815, 312]
    assert [stage.accumulate_grad_batches for stage in plan.stages] == [64, 32]


@pytest.mark.parametrize(("batch", "lr", "warmup_epochs"), RESNET_ROWS)
def test_resnet50_rows_of_table_5(batch: int, lr: float, warmup_epochs: float):
    plan = plan_from_recipe("resnet50", global_batch_size=batch, micro_batch_size=8, data_parallel_size=16)
    assert plan.lr == pytest.approx(lr, rel=1e-7)
    assert plan.stages[0].warmup_fraction * 90 == pytest.approx(warmup_epochs, rel=1e-12)
    assert plan.total_steps == math.ceil(90 * 1_281_167 / batch)
    # Half a step of rounding, and the part of a step that the total was rounded up by.
    assert plan.warmup_steps == pytest.approx(warmup_epochs * 1_281_167 / batch, abs=0.75)


def test_cifar10_davidnet_takes_24_epochs_at_512_and_asks_for_the_learning_rate():
    with pytest.raises(InvalidOptionError) as error:
        plan_from_recipe("cifar10-davidnet", micro_batch_size=128, data_parallel_size=1)
    assert "base_lr: the recipe cifar10-davidnet has no learning rate" in str(error.value)
    assert "Table 6 prints accuracies only" in str(error.value)
    assert "the learning rate at batch 512" in str(error.value)
    plan = plan_from_recipe("cifar10-davidnet", micro_batch_size=128, data_parallel_size=1, base_lr=0.02)
    assert (plan.global_batch_size, plan.total_steps, plan.lr) == (512, 2344, 0.02)
    assert plan.sources["base_lr"] == "given by you"


def test_mnist_lenet_takes_30_epochs_at_1024_with_our_measured_rate():
    plan = plan_from_recipe("mnist-lenet", micro_batch_size=128, data_parallel_size=2)
    assert (plan.global_batch_size, plan.total_steps, plan.accumulate_grad_batches) == (1024, 1758, 4)
    assert (plan.lr, plan.warmup_steps) == (0.01, 59)  # one epoch: 58.6 steps
    assert plan.sources["base_lr"].startswith("ours")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_rows_kept_in_a_recipe_come_out_too(recipe: Recipe):
    assert recipe.rows
    for row in recipe.rows:
        plan = plan_from_recipe(
            recipe, global_batch_size=row.global_batch_size, micro_batch_size=8, data_parallel_size=2,
            base_lr=recipe.base_lr or 0.01,
        )  # fmt: skip
        assert row.total_steps in (None, plan.total_steps)
        assert plan.lr == pytest.approx(row.lr or plan.lr, rel=1e-12)
        assert plan.stages[0].warmup_fraction == pytest.approx(
            plan.stages[0].warmup_fraction if row.warmup_fraction is None else row.warmup_fraction, rel=1e-12
        )


def test_the_recipes_keep_the_rows_typed_in_above():
    assert [(row.global_batch_size, row.total_steps) for row in BERT_LARGE.rows] == [row[:2] for row in BERT_ROWS]
    assert [row.lr for row in RECIPES["resnet50"].rows] == pytest.approx([row[1] for row in RESNET_ROWS], rel=1e-7)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_every_number_of_a_recipe_has_a_source(recipe: Recipe):
    assert {"base_lr", "warmup_fraction", "samples", "decay", "parameters"} <= set(recipe.sources)
    assert all(recipe.sources.values())


# ---- sizes, counted again


def bert_large_tensors() -> list[tuple[int, ...]]:
    """Shapes of BERT-Large with its pre-training heads; the output embedding is tied."""
    width, inner = 1024, 4096
    linear = [(width, width), (width,)]
    norm = [(width,), (width,)]
    layer = linear * 4 + norm + [(inner, width), (inner,), (width, inner), (width,)] + norm
    embeddings = [(30522, width), (512, width), (2, width), *norm]
    heads = [*linear, *norm, (30522,), (2, width), (2,)]
    return embeddings + layer * 24 + linear + heads


def resnet50_tensors() -> list[tuple[int, ...]]:
    def conv(inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]

    tensors, inputs = conv(3, 64, 7), 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            if block == 0:
                tensors += conv(inputs, 4 * width, 1)
            tensors += conv(inputs, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            inputs = 4 * width
    return [*tensors, (1000, 2048), (1000,)]


def davidnet_tensors() -> list[tuple[int, ...]]:
    channels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    convs = [shape for i, o in channels for shape in ((o, i, 3, 3), (o,), (o,))]
    return [*convs, (10, 512)]


def lenet5_tensors() -> list[tuple[int, ...]]:
    return [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("bert-large", bert_large_tensors()),
        ("bert-large-mixed", bert_large_tensors()),
        ("resnet50", resnet50_tensors()),
        ("cifar10-davidnet", davidnet_tensors()),
        ("mnist-lenet", lenet5_tensors()),
    ],
)
def test_parameters_and_layers_add_up_from_the_architecture(name: str, tensors: list[tuple[int, ...]]):
    assert RECIPES[name].parameters == sum(math.prod(shape) for shape in tensors)
    assert RECIPES[name].layers == sum(len(shape) >= 2 for shape in tensors)


# ---- input


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(
        InvalidOptionError, match=r"recipe='bert_large' is not one of: bert-large, .*Did you mean 'bert-large'"
    ):
        recipe_named("bert_large")


def test_a_batch_that_a_later_stage_cannot_halve_is_refused():
    with pytest.raises(BatchSizeError, match=r"has 32768/65536 of the first stage's batch.*multiple of 2"):
        plan_from_recipe("bert-large-mixed", global_batch_size=4095, micro_batch_size=1, data_parallel_size=1)


def test_a_stage_that_does_not_divide_is_named():
    with pytest.raises(BatchSizeError, match=r"^Stage 2: global_batch_size=32768 is not a multiple .* = 128 \* 512"):
        plan_from_recipe("bert-large-mixed", micro_batch_size=128, data_parallel_size=512)


def test_one_micro_batch_per_stage():
    plan = plan_from_recipe("bert-large-mixed", micro_batch_size=[128, 16], data_parallel_size=512)
    assert [stage.accumulate_grad_batches for stage in plan.stages] == [1, 4]
    with pytest.raises(InvalidOptionError, match=r"micro_batch_size=\[1, 2, 3\] has 3 numbers for 2 stages"):
        plan_from_recipe("bert-large-mixed", micro_batch_size=[1, 2, 3], data_parallel_size=1)


def test_a_batch_too_large_for_the_warmup_is_refused():
    with pytest.raises(PlanError, match=r"becomes 1.6 at batch 262144.*largest batch for it is 163840"):
        plan_from_recipe("bert-large", global_batch_size=262144, micro_batch_size=64, data_parallel_size=64)


def test_a_warmup_longer_than_the_first_stage_runs_on_into_the_second():
    plan = plan_from_recipe("bert-large", global_batch_size=163840, micro_batch_size=64, data_parallel_size=64)
    assert plan.total_steps == 3125
    assert [stage.warmup_steps for stage in plan.stages] == [2813, 312]
    assert plan.warmup_steps == 3125


def test_what_the_user_gives_replaces_the_recipes_numbers():
    plan = plan_from_recipe(
        "bert-large", global_batch_size=4096, micro_batch_size=8, data_parallel_size=2, base_lr=1e-3,
        base_batch_size=1024, warmup_fraction=0.01, lr_scaling="linear",
    )  # fmt: skip
    assert (plan.lr, plan.warmup_steps, plan.lr_scaling) == (0.004, 5000, "linear")
    assert [name for name, source in plan.sources.items() if source == "given by you"] == [
        "base_lr", "warmup_fraction", "base_batch_size",
    ]  # fmt: skip
