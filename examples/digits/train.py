"""Trains a classifier of digits with LAMB at a large emulated batch.

python examples/digits/train.py fit --config configs/digits.yaml
python examples/digits/train.py fit --config configs/digits.yaml --data.root /path/to/mnist
python examples/digits/train.py fit --help
"""

from __future__ import annotations

from digits_data import DigitsData
from digits_model import DigitsClassifier
from lightning_lamb import LambCLI


class DigitsCLI(LambCLI):
    """LambCLI that ends a training with the accuracy on the test images."""

    def after_fit(self) -> None:
        if not self.trainer.fast_dev_run:
            self.trainer.test(self.model, datamodule=self.datamodule)


if __name__ == "__main__":
    DigitsCLI(DigitsClassifier, DigitsData)
