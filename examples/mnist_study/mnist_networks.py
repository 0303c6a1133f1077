"""The five networks of the study, with the initialisation of its notebook or torch's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

Init = Literal["normal", "fan_in"]


class Mlp(nn.Sequential):
    """784-256-256-256-10 with ReLU: 335,114 parameters."""

    def __init__(self) -> None:
        sizes = (784, 256, 256, 256)
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*hidden, nn.Linear(256, 10))


class Cnn(nn.Module):
    """Two convolutions with max-pooling, a hidden layer of 1024, and dropout that stays on when testing, as it did."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 5, padding=2)
        self.second = nn.Conv2d(32, 64, 5, padding=2)
        self.hidden = nn.Linear(3136, 1024)
        self.output = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = F.max_pool2d(F.relu(self.first(images.view(-1, 1, 28, 28))), 2)
        features = F.max_pool2d(F.relu(self.second(features)), 2)
        hidden = F.relu(self.hidden(features.flatten(1)))
        return self.output(F.dropout(hidden, 0.2, training=True))


class Recurrent(nn.Module):
    """28 rows of 28 pixels through 128 units in each direction; the last time step's 256 outputs are classified."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(28, 128, batch_first=True, bidirectional=True)
        self.output = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.cell(images.view(-1, 28, 28))
        return self.output(states[:, -1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": Mlp,
    "CNN": Cnn,
    "Bi-RNN": lambda: Recurrent(nn.RNN),
    "Bi-GRU": lambda: Recurrent(nn.GRU),
    "Bi-LSTM": lambda: Recurrent(nn.LSTM),
}


def network(name: str, init: Init, seed: int) -> nn.Module:
    """One of NETWORKS.

    Args:
        name: its key.
        init: "normal" draws every weight and bias from N(0, 1), as the notebook does; recurrent cells get Glorot's
            uniform and zero biases (forget gate 1), TensorFlow's default. "fan_in" is torch's own, which scales with
            the number of inputs.
        seed: of the initial weights.
    """
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    if init == "normal":
        for parameter_name, parameter in model.named_parameters():
            with torch.no_grad():
                (_as_tensorflow_cell if parameter_name.startswith("cell.") else nn.init.normal_)(parameter)
    return model


def _as_tensorflow_cell(parameter: Tensor) -> None:
    # TensorFlow 1 keeps one kernel of (inputs + units, gates * units), whose size sets Glorot's bound for both of ours.
    units, inputs = 128, 28
    if parameter.ndim == 2:
        bound = math.sqrt(6 / (inputs + units + parameter.shape[0]))
        nn.init.uniform_(parameter, -bound, bound)
    else:
        nn.init.zeros_(parameter)
        gates = parameter.shape[0] // units
        if gates == 4:  # input, forget, cell, output; torch adds two bias vectors
            parameter[units : 2 * units] = 0.5
        elif gates == 3:  # reset and update gates start open
            parameter[: 2 * units] = 0.5
