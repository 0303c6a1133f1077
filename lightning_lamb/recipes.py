"""The paper's training recipes as data, each number with its source.

"The paper" is You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, arXiv
1904.00962v5. A recipe holds one anchor (the batch, learning rate and warm-up of one printed row); every other printed
row must follow from it by the two rules of :mod:`lightning_lamb.scaling`, and the tests check that they do. What the
paper does not print is either marked as ours or left out, and then has to be given by the user.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lightning_lamb.checks import one_of
from lightning_lamb.scaling import LRScaling


@dataclasses.dataclass(frozen=True)
class RecipeStage:
    """A part of a training with its own batch and data.

    Attributes:
        global_batch_size: Samples per optimizer step, as in the paper; another batch for the first stage scales all.
        samples: Samples this stage sees; the same at every batch.
        sequence_length: Tokens per sample, or None.
        restarts_schedule: The learning rate warms up from zero again; otherwise the schedule runs on across the switch.
    """

    global_batch_size: int
    samples: int
    sequence_length: int | None = None
    restarts_schedule: bool = True


@dataclasses.dataclass(frozen=True)
class PrintedRow:
    """One row of the paper's tables: what must come out at this batch. None: not printed.

    Attributes:
        global_batch_size: Samples per optimizer step (of the first stage).
        total_steps: Optimizer steps over all stages.
        lr: Peak learning rate.
        warmup_fraction: Warm-up as a share of the training.
    """

    global_batch_size: int
    total_steps: int | None = None
    lr: float | None = None
    warmup_fraction: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training recipe: one anchor row, the samples to see, and the model's size.

    Attributes:
        name: What ``--recipe`` takes.
        title: One line for people.
        stages: The parts of the training, in order.
        base_batch_size: Global batch of the anchor.
        base_lr: Learning rate at the anchor; None: the paper does not print it and the user must give it.
        warmup_fraction: Warm-up at the anchor, as a share of the schedule.
        parameters: The model's parameter count, heads included.
        layers: Its tensors with at least two dimensions, which get a trust ratio.
        sources: Where each number comes from, by field name.
        rows: The paper's printed rows.
        lr_scaling: Rule from the anchor to other batches.
        dataset_size: Samples in the dataset, if the recipe counts epochs.
        epochs: Passes over it.
    """

    name: str
    title: str
    stages: tuple[RecipeStage, ...]
    base_batch_size: int
    base_lr: float | None
    warmup_fraction: float
    parameters: int
    layers: int
    sources: Mapping[str, str]
    rows: tuple[PrintedRow, ...]
    lr_scaling: LRScaling = "sqrt"
    dataset_size: int | None = None
    epochs: int | None = None


def recipe_named(name: str) -> Recipe:
    """Look a recipe up.

    Raises:
        InvalidOptionError: There is no such recipe; the message lists them.

    Example:
        >>> recipe_named("bert-large").base_lr
        0.005
    """
    return RECIPES[one_of("recipe", name, RECIPES)]


PAPER = "arXiv 1904.00962v5"
_SCALING_RULES = f"{PAPER}, section 4: square-root learning-rate scaling, linear-epoch warm-up"
_DECAY = f"{PAPER}, section 4: lr * (1 - t/T)"
_DECAY_DERIVED = f"the decay {PAPER} states for BERT, (1 - t/T), taken over"

# Devlin et al. train 1,000,000 steps of 512 sequences, nine tenths at length 128; the paper keeps these samples.
_BERT_SAMPLES = 512_000_000
_BERT_SIZE_SOURCE = (
    "BERT-Large uncased as pre-trained: 335,141,888 in the encoder with pooler (vocabulary 30,522), 1,084,220 in the "
    "masked-word and next-sentence heads, output embedding tied"
)

BERT_LARGE = Recipe(
    name="bert-large",
    title="BERT-Large pre-training, one batch size",
    stages=(
        RecipeStage(32768, _BERT_SAMPLES * 9 // 10, sequence_length=128),
        RecipeStage(32768, _BERT_SAMPLES // 10, sequence_length=512, restarts_schedule=False),
    ),
    base_batch_size=32768,
    base_lr=5e-3,
    warmup_fraction=1 / 5,
    parameters=336_226_108,
    layers=150,
    sources={
        "base_lr": f"{PAPER}, Table 4, row 32K",
        "warmup_fraction": f"{PAPER}, Table 4, row 32K",
        "samples": f"{PAPER}, Table 1: 1000k steps at batch 512",
        "stages": f"{PAPER}, section 4: 14063 steps at sequence length 128, 1562 at 512; one schedule over both",
        "scaling": _SCALING_RULES,
        "decay": _DECAY,
        "parameters": _BERT_SIZE_SOURCE,
    },
    # Steps: Table 1. Learning rates 5 / (2^k * 10^3), k = 3, 2.5 ... 0, and warm-up ratios: Table 4.
    rows=(
        PrintedRow(512, 1_000_000, 5 / (2**3.0 * 1e3), 1 / 320),
        PrintedRow(1024, 500_000, 5 / (2**2.5 * 1e3), 1 / 160),
        PrintedRow(2048, 250_000, 5 / (2**2.0 * 1e3), 1 / 80),
        PrintedRow(4096, 125_000, 5 / (2**1.5 * 1e3), 1 / 40),
        PrintedRow(8192, 62_500, 5 / (2**1.0 * 1e3), 1 / 20),
        PrintedRow(16384, 31_250, 5 / (2**0.5 * 1e3), 1 / 10),
        PrintedRow(32768, 15_625, 5 / (2**0.0 * 1e3), 1 / 5),
    ),
)

BERT_LARGE_MIXED = Recipe(
    name="bert-large-mixed",
    title="BERT-Large pre-training in 76 minutes: batch 65536 at length 128, then 32768 at 512 with re-warm-up",
    stages=(
        RecipeStage(65536, 7037 * 65536, sequence_length=128),
        RecipeStage(32768, 1562 * 32768, sequence_length=512),
    ),
    base_batch_size=32768,
    base_lr=5e-3,
    warmup_fraction=1 / 5,
    parameters=336_226_108,
    layers=150,
    sources={
        "stages": f"{PAPER}, Table 1, row 64k/32k: 8599 steps; section 4: lengths 128 and 512, re-warm-up from zero",
        "samples": "7037 + 1562 steps: section 4 prints 1562 steps at length 512 and batch 32768; 8599 - 1562 are left",
        "base_lr": f"derived: {PAPER} prints none for the mixed run; Table 4's row 32K, scaled to each stage's batch",
        "warmup_fraction": f"derived: as base_lr; a share of each stage, so {PAPER}'s 1/5 at 32768 and 2/5 at 65536",
        "scaling": _SCALING_RULES,
        "decay": _DECAY,
        "parameters": _BERT_SIZE_SOURCE,
    },
    rows=(PrintedRow(65536, 8599),),
)

RESNET50 = Recipe(
    name="resnet50",
    title="ResNet-50 on ImageNet, 90 epochs",
    stages=(RecipeStage(32768, 90 * 1_281_167),),
    base_batch_size=32768,
    base_lr=4e-2,
    warmup_fraction=20 / 90,
    parameters=25_557_032,
    layers=54,
    sources={
        "base_lr": f"{PAPER}, Table 5, row 32K",
        "warmup_fraction": f"{PAPER}, Table 5, row 32K: 20 of 90 epochs",
        "samples": "90 epochs (Table 5) of the 1,281,167 training images of ILSVRC-2012",
        "scaling": _SCALING_RULES,
        "decay": _DECAY_DERIVED,
        "parameters": "ResNet-50 with 1000 classes: 53 convolutions, their batch norms, one linear layer",
    },
    # Learning rates 4 / (2^k * 100), k = 3, 2.5 ... 0, and warm-up epochs of 90: Table 5.
    rows=(
        PrintedRow(512, None, 4 / (2**3.0 * 100), 0.3125 / 90),
        PrintedRow(1024, None, 4 / (2**2.5 * 100), 0.625 / 90),
        PrintedRow(2048, None, 4 / (2**2.0 * 100), 1.25 / 90),
        PrintedRow(4096, None, 4 / (2**1.5 * 100), 2.5 / 90),
        PrintedRow(8192, None, 4 / (2**1.0 * 100), 5 / 90),
        PrintedRow(16384, None, 4 / (2**0.5 * 100), 10 / 90),
        PrintedRow(32768, None, 4 / (2**0.0 * 100), 20 / 90),
    ),
    dataset_size=1_281_167,
    epochs=90,
)

CIFAR10_DAVIDNET = Recipe(
    name="cifar10-davidnet",
    title="DavidNet (ResNet-9) on CIFAR-10, 24 epochs",
    stages=(RecipeStage(512, 24 * 50_000),),
    base_batch_size=512,
    base_lr=None,
    warmup_fraction=0.0,
    parameters=6_573_120,
    layers=9,
    sources={
        "base_lr": f"not in {PAPER}: Table 6 prints accuracies only; give your own",
        "warmup_fraction": f"not in {PAPER}, Table 6: none is taken unless you give one",
        "samples": f"{PAPER}, Table 6: batch 512, 24 epochs; CIFAR-10 has 50,000 training images",
        "decay": _DECAY_DERIVED,
        "parameters": "ResNet-9 of David Page's DAWNBench entry: 8 convolutions, their batch norms, one linear layer",
    },
    rows=(PrintedRow(512),),
    dataset_size=50_000,
    epochs=24,
)

MNIST_LENET = Recipe(
    name="mnist-lenet",
    title="LeNet on MNIST, 30 epochs",
    stages=(RecipeStage(1024, 30 * 60_000),),
    base_batch_size=1024,
    base_lr=1e-2,
    warmup_fraction=1 / 30,
    parameters=61_706,
    layers=5,
    sources={
        "base_lr": (
            f"ours, {PAPER}, Table 7 prints accuracies only: LeNet-5 with 1 epoch of warm-up and linear decay reached "
            "0.9923 test accuracy at lr 0.01 (one seed; two rates probed for 2 epochs)"
        ),
        "warmup_fraction": "ours: 1 of 30 epochs, as for base_lr",
        "samples": f"{PAPER}, Table 7: batch 1024, 30 epochs; MNIST has 60,000 training images",
        "decay": _DECAY_DERIVED,
        "parameters": "LeNet-5 (6, 16, 120, 84), which the paper does not specify",
    },
    rows=(PrintedRow(1024),),
    dataset_size=60_000,
    epochs=30,
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (BERT_LARGE, BERT_LARGE_MIXED, RESNET50, CIFAR10_DAVIDNET, MNIST_LENET)
}
