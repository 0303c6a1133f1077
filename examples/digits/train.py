"""Trains a classifier of digits with LAMB at a large emulated batch.

python examples/digits/train.py fit --config configs/digits.yaml
python examples/digits/train.py fit --config configs/digits.yaml --data.root /path/to/mnist
python examples/digits/train.py fit --help
"""

from __future__ import annotations

import torch

from digits_data import DigitsData
from digits_model import DigitsClassifier
from lightning_lamb import LambCLI


class DigitsCLI(LambCLI):
    """LambCLI that ends a training with the accuracy on the test images."""

    def before_fit(self) -> None:
        if self.datamodule.root is None:
            torch.set_num_threads(1)  # 8 x 8 images gain nothing from a second thread, and lose much on shared cores

    def after_fit(self) -> None:
        if not self.trainer.fast_dev_run:
            self.trainer.test(self.model, datamodule=self.datamodule)


if __name__ == "__main__":
    DigitsCLI(DigitsClassifier, DigitsData)
