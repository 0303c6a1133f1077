"""Optimizers with given learning rates, and the rates that a scheduler has them use: shared by the schedule tests."""

from __future__ import annotations

import torch

from lightning_lamb.schedules import Stage

STAGES = [Stage(6, 2, lr=0.01), Stage(4, 2, lr=0.005)]
# Worked out by hand, ten steps and the end.
RATES = [0.005, 0.01, 0.04 / 6, 0.03 / 6, 0.02 / 6, 0.01 / 6, 0.0025, 0.005, 0.0025, 0.00125, 0.0]


def sgd(*lrs: float, tensor: bool = False) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": torch.tensor(lr, dtype=torch.float64) if tensor else lr}
        for lr in lrs or (0.01,)
    ]
    return torch.optim.SGD(groups)


def run(optimizer: torch.optim.Optimizer, scheduler: object, steps: int) -> list[list[float]]:
    """Take steps; return the rates that each of them (and then a further one) would use, per group."""
    used = []
    for _ in range(steps):
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return [*used, [float(group["lr"]) for group in optimizer.param_groups]]


def first_group(rates: list[list[float]]) -> list[float]:
    return [group_rates[0] for group_rates in rates]
