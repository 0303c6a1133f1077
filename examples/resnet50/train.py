"""Trains ResNet-50 on ImageNet at a batch of 32768 by the paper's Table 5, or tries the plan on made-up images.

python examples/resnet50/train.py fit --config configs/resnet50-imagenet.yaml --data.root /path/to/imagenet
python examples/resnet50/train.py fit --config configs/resnet50-imagenet.yaml --trainer.fast_dev_run 1 --data.size 64
"""

from __future__ import annotations

from lightning_lamb import LambCLI
from resnet50_data import ImageData
from resnet50_model import ImageClassifier

if __name__ == "__main__":
    LambCLI(ImageClassifier, ImageData)
