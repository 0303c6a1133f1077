"""ResNet-50 as published, and how it is trained to classify."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut (He et al., arXiv 1512.03385); the stride is in the 3x3.

    Args:
        inputs: channels that come in.
        width: channels of the 3x3; four times as many go out.
        stride: of the 3x3 and of the shortcut.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.residual = nn.Sequential(
            *convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            *convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(width, outputs, 1),
        )
        # Each block starts as its shortcut (Goyal et al., arXiv 1706.02677): large batches need it.
        nn.init.zeros_(self.residual[-1].weight)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*convolution(inputs, outputs, 1, stride))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.residual(images) + self.shortcut(images))


class ResNet50(nn.Sequential):
    """Images of any size to class scores: 25,557,032 parameters for 1000 classes and width 64.

    Args:
        classes: number of classes.
        width: channels of the first stage.
    """

    def __init__(self, classes: int = 1000, width: int = 64) -> None:
        stem = [*convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        blocks, inputs = [], width
        for stage, count in enumerate(BLOCKS):
            for index in range(count):
                blocks.append(Bottleneck(inputs, width * 2**stage, 2 if stage and index == 0 else 1))
                inputs = 4 * width * 2**stage
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution without bias, initialised for ReLU, and its batch norm."""
    layer = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer, nn.BatchNorm2d(outputs)


class ImageClassifier(LightningModule):
    """ResNet-50 with cross entropy; logs loss and accuracy. Batch norm sees micro-batches, as on any cluster.

    Args:
        classes: Number of classes.
        width: Channels of the first stage; 64 is ResNet-50.
    """

    def __init__(self, classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = ResNet50(classes, width)
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_top5 = MulticlassAccuracy(classes, average="micro", top_k=min(5, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.val_accuracy(logits, labels)
        self.val_top5(logits, labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)
        self.log("val_top5", self.val_top5)
