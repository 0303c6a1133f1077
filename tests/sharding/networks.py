"""The network that is cut in every layout, the data it sees, and the same training in float64 on one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tolerances import relative_error
from torch import Tensor, nn

STEPS = 20
GLOBAL_BATCH = 16
INPUTS, OUTPUTS = 8, 3


class Net(nn.Module):
    """Layers of every awkward kind, in a forward pass that uses them all.

    * ``wide``: uneven rows over 2 and 4 ranks, and in FSDP1 a flat cut through the middle of its rows.
    * ``narrow``: 3 rows, so that of 4 ranks one has none; FSDP1 leaves whole layers empty on most ranks.
    * ``scale``: a single element; somewhere it is on one rank only.
    * ``zero``: starts at zero, in a residual branch.
    * ``tied``: the weight of ``wide`` a second time.
    * ``frozen``: takes part, but has no gradient.

    Args:
        width: 17 is divided by nothing; tensor parallelism needs an even one.
    """

    def __init__(self, width: int = 17) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, width)
        self.norm = nn.Sequential(nn.LayerNorm(width), nn.Tanh())
        self.wide = nn.Linear(width, width)
        self.zero = nn.Linear(width, width, bias=False)
        self.tied = nn.Linear(width, width, bias=False)
        self.frozen = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(1))
        self.narrow = nn.Linear(width, OUTPUTS)
        nn.init.zeros_(self.zero.weight)
        self.tied.weight = self.wide.weight
        self.frozen.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.first(inputs))
        hidden = hidden + self.zero(hidden) * self.scale
        hidden = self.frozen(self.wide(hidden).tanh())
        return self.narrow(self.tied(hidden).tanh())


def new_net(width: int, seed: int = 0) -> Net:
    """The same network on every rank."""
    torch.manual_seed(seed)
    return Net(width)


def batches(steps: int = STEPS, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, targets) of one global batch per step, in float64."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(GLOBAL_BATCH, INPUTS, generator=draw, dtype=torch.float64)
        yield inputs, inputs[:, :OUTPUTS].sin()


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples, so that the mean over equal parts of a batch is that of the batch."""
    return (model(inputs).to(targets.dtype) - targets).square().sum(1).mean()


def drifts(weights: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error of a layer: of the one that started at zero, and of the others.

    A layer at zero has a trust ratio of one and then one made of rounding: it drifts a thousand times further, and
    would hide the others.
    """
    found = {name: relative_error(weights[name], exact[name]) for name in exact}
    return {"zero": found.pop("zero.weight"), "others": max(found.values())}


def learning_rate(step: int) -> float:
    """A warm-up from zero, then a slow decay: the rate changes at every step."""
    return 0.05 * min(step / 4, 1.0 - step / 40)
