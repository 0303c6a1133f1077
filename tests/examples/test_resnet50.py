"""The ResNet-50 example: the published network, folders of images, and the paper's Table 5 in its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from example_scripts import ROOT, module
from lightning.pytorch import Trainer
from PIL import Image

from lightning_lamb import Lamb, LargeBatch, plan_from_recipe
from lightning_lamb.recipes import RESNET50

data = module("resnet50", "resnet50_data")
model = module("resnet50", "resnet50_model")

CONFIG = ROOT / "configs" / "resnet50-imagenet.yaml"


def test_the_network_is_the_published_one():
    with torch.device("meta"):
        network = model.ResNet50()
    parameters = list(network.parameters())
    assert sum(parameter.numel() for parameter in parameters) == RESNET50.parameters
    assert sum(parameter.ndim > 1 for parameter in parameters) == RESNET50.layers
    assert len(parameters) == 161


def test_every_block_starts_as_its_shortcut():
    block = model.Bottleneck(16, 4, 1)
    images = torch.rand(2, 16, 8, 8)
    assert torch.equal(block(images), images)


# ---- images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """3 classes of 4 images of 40 x 24, each of one colour; class 1 has them in a subfolder."""
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cow")):
            place = tmp_path / part / name / ("deep" if label == 1 else "")
            place.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 24), (80 * label, 10 * index, 0)).save(place / f"{index}.png")
            (place / "notes.txt").write_text("no image")
    return tmp_path


def test_classes_are_numbered_by_name_and_pixels_are_normalised(folder: Path):
    images = data.ImageFolder(folder / "val", size=16, augment=False)
    assert images.classes == ["ant", "bee", "cow"]
    assert [int(images[index][1]) for index in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    pixels, _ = images[4 + 2]
    assert pixels.shape == (3, 16, 16)
    expected = (np.array([80, 20, 0]) / 255 - data.MEAN) / data.DEVIATION
    assert torch.allclose(pixels.double(), torch.tensor(expected).view(3, 1, 1).expand(3, 16, 16), atol=1e-6)


def test_grey_images_and_images_with_transparency_become_rgb(folder: Path):
    Image.new("L", (30, 30), 100).save(folder / "val" / "ant" / "grey.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 4)).save(folder / "val" / "ant" / "transparent.png")
    images = data.ImageFolder(folder / "val", size=8, augment=False)
    assert all(images[index][0].shape == (3, 8, 8) for index in range(len(images)))


def test_augmentation_depends_on_seed_pass_and_image_only(tmp_path: Path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "train" / "a" / "0.png")
    images, again = (data.ImageFolder(tmp_path / "train", 16, augment=True, seed=3) for _ in range(2))
    assert torch.equal(images[0][0], again[0][0])
    again.epoch = 1
    assert not torch.equal(images[0][0], again[0][0])


def test_boxes_lie_inside_the_image_and_have_the_published_sizes_and_ratios():
    random = np.random.default_rng(0)
    for size in ((100, 60), (60, 100), (300, 10)):
        for _ in range(50):
            left, upper, right, lower = data.random_box(size, random)
            assert 0 <= left < right <= size[0] + 1e-9
            assert 0 <= upper < lower <= size[1] + 1e-9
            if size != (300, 10):
                assert 3 / 4 - 1e-9 <= (right - left) / (lower - upper) <= 4 / 3 + 1e-9
    assert data.middle_box((320, 256)) == (48, 16, 272, 240)  # 224 of 256, as ever


@pytest.mark.parametrize("missing", ["nowhere", "val/ant/deep"])
def test_a_folder_without_images_says_what_it_should_hold(folder: Path, missing: str):
    with pytest.raises(
        FileNotFoundError, match=r"holds no images: it should have one folder per class(.|\n)*data\.root"
    ):
        data.ImageFolder(folder / missing, 16, augment=False)


def test_the_sampler_tells_the_images_their_epoch(folder: Path):
    images = data.ImageData(str(folder), batch_size=4, size=16)
    images.setup("fit")
    loader = images.train_dataloader()
    loader.sampler.set_epoch(5)
    assert images.train_set.epoch == 5


# ---- the config


def init_args(config: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in config["trainer"]["callbacks"] if c["class_path"].endswith(name)]
    return found.get("init_args", {})


@pytest.mark.parametrize("gpus", [8, 16, 32, 64, 128, 256])
def test_the_config_is_table_5_on_8_to_256_gpus(gpus: int):
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert init_args(config, "LargeBatch") == {"recipe": "resnet50"}
    plan = plan_from_recipe("resnet50", micro_batch_size=config["data"]["batch_size"], data_parallel_size=gpus)
    assert plan.accumulate_grad_batches * gpus * config["data"]["batch_size"] == 32768
    assert plan.lr == config["optimizer"]["init_args"]["lr"] == 0.04
    assert config["trainer"]["max_epochs"] == RESNET50.epochs


@pytest.mark.parametrize(("batch", "lr"), [(32, 4e-2 / 2**5), (128, 4e-2 / 2**4)])
def test_made_up_images_show_the_plan_at_another_batch(batch: int, lr: float):
    """The recipe's square root of the batch and linear-epoch warm-up, in a real training of a narrow network."""
    seen = LargeBatch(recipe="resnet50", global_batch_size=batch)
    images = data.ImageData(batch_size=16, size=32, made_up=256, classes=4)
    classifier = model.ImageClassifier(classes=4, width=4)
    classifier.configure_optimizers = lambda: Lamb(classifier.named_parameters(), lr=0.04)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier, images)
    assert seen.derived is not None
    assert trainer.global_step == seen.derived.total_steps == 2 * 256 // batch
    assert seen.derived.accumulate_grad_batches == batch // 16
    assert seen.derived.learning_rates == pytest.approx((lr,))
    assert 0 < float(trainer.callback_metrics["val_top5"]) <= 1
