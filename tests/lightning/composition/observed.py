"""A module that writes down what really happens to it, and data whose samples can be told apart.

Nothing here asks lightning_lamb: the samples are those that ``training_step`` got, learning rates and gradients those
that the optimizer was called with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.lightning.composition.cell import SAMPLES


def sample(index: int) -> tuple[Tensor, Tensor, int]:
    """Input of 3 numbers, target, and who it is."""
    inputs = torch.sin(torch.arange(1.0, 4.0) * (index + 1))
    return inputs, inputs.sum(0, keepdim=True).cos(), index


class Samples(Dataset):
    """So many samples, from ``first`` on; ``noise`` is drawn from torch's generator where the sample is made."""

    def __init__(self, length: int = SAMPLES, first: int = 0, noise: bool = False) -> None:
        self.length, self.first, self.noise = length, first, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        inputs, target, who = sample(self.first + int(index))
        return (inputs + torch.rand(3) if self.noise else inputs), target, who


def network() -> nn.Module:
    """The layers, the same in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.ModuleDict(
            {"backbone": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "head": nn.Linear(4, 1)},
        )


@dataclasses.dataclass
class Window:
    """What one call of the optimizer had: primitives, so that it travels between processes."""

    epoch: int
    accumulation: int
    samples: list[list[int]]
    """By micro-batch of this rank."""
    inputs: Tensor
    targets: Tensor
    rates: list[float]
    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    taken: bool = False


class Observed(LightningModule):
    """Trains the network and keeps a `Window` per optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        layers = network()
        self.backbone, self.head = layers["backbone"], layers["head"]
        self.windows: list[Window] = []
        self.told: int | None = None
        self.open: list[tuple[Tensor, Tensor, list[int]]] = []
        self._watched: set[int] = set()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets, who = unpacked(batch)
        self.open.append((inputs.detach().double(), targets.detach().double(), [int(one) for one in who]))
        self.log("constant", 1.0)
        return (self(inputs) - targets).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", 1.0)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def on_train_start(self) -> None:
        """A finder trains too, before the training: that is forgotten."""
        self.windows, self.open = [], []
        for optimizer in self.trainer.optimizers:
            inner = getattr(optimizer, "_optimizer", optimizer)
            if id(inner) not in self._watched:
                self._watched.add(id(inner))
                inner.register_step_post_hook(self._after_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """All callbacks, LargeBatch among them, have changed the gradients before the module is asked."""
        inputs, targets, who = zip(*self.open, strict=True) if self.open else ((), (), ())
        named = {name: parameter for name, parameter in self.named_parameters() if parameter.grad is not None}
        self.windows.append(
            Window(
                self.trainer.current_epoch,
                self.trainer.accumulate_grad_batches,
                list(who),
                torch.cat(inputs) if inputs else torch.zeros(0, 3),
                torch.cat(targets) if targets else torch.zeros(0, 1),
                [float(group["lr"]) for group in optimizer.param_groups],
                {name: parameter.detach().double().clone() for name, parameter in self.named_parameters()},
                {name: parameter.grad.detach().double().clone() for name, parameter in named.items()},
            )
        )
        self.open = []

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A GradScaler may call a fused step that it wants skipped: a step that is taken then moves the weights."""
        window = self.windows[-1]
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        moved = any(not torch.equal(p.detach().double(), window.weights[n]) for n, p in self.named_parameters())
        window.taken = moved or not scaled or not any(window.rates)


def unpacked(batch: Any) -> tuple[Tensor, Tensor, Any]:
    """Inputs, targets and identities, whatever the loader wrapped them in."""
    if isinstance(batch, dict) and "inputs" not in batch:  # of several loaders: the first counts
        batch = next(iter(batch.values()))
    elif isinstance(batch, (list, tuple)) and isinstance(batch[0], (list, tuple)) and len(batch) == 2:
        batch = batch[0]
    if isinstance(batch, dict):
        batch = (batch["inputs"], batch["targets"], batch["who"])
    elif dataclasses.is_dataclass(batch):
        batch = (batch.inputs, batch.targets, batch.who)
    inputs, targets, who = batch
    if isinstance(inputs, (list, tuple)):  # images in a list
        inputs = torch.stack(list(inputs))
    return inputs, targets, who


def mean_gradients(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradient of the mean loss over these samples, in float64: what a window must give."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    module = Observed().double()
    predicted = torch.func.functional_call(module, leaves, (inputs,))
    loss = (predicted - targets).pow(2).mean()
    names = list(leaves)
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))
