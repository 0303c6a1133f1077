"""Optimizer state in a checkpoint under the names of parameters instead of numbers.

Lightning and torch take the numbers of a one-file checkpoint for positions in ``module.parameters()`` when FSDP or
`ModelParallelStrategy` reads it. With parameter groups, or frozen parameters that are in none, they are not, and one
layer would continue with the state of another. Names are unmistakable, and every optimizer of torch loads them.
"""

from __future__ import annotations

from typing import Any

from lightning_lamb.lightning_seams import LightningModule, Trainer, inner_optimizer
from lightning_lamb.optimizers import LayerwiseOptimizer, ShardedStateOptimizer
from lightning_lamb.sharding import clean_name


def name_optimizer_states(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Replaces numbers by names in the state of our optimizers, where Lightning has put numbers.

    Args:
        trainer: which saves.
        module: the module that it trains.
        checkpoint: what it saves; modified in place. The optimizers' own dicts are not.
    """
    names = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    states = checkpoint.get("optimizer_states", [])
    for index, (optimizer, state) in enumerate(zip(trainer.optimizers, states)):
        own = inner_optimizer(optimizer)
        if isinstance(own, (LayerwiseOptimizer, ShardedStateOptimizer)) and "param_groups" in state:  # ZeRO has its own
            states[index] = _named(state, [[names.get(id(p)) for p in group["params"]] for group in own.param_groups])


def _named(state: dict[str, Any], names: list[list[str | None]]) -> dict[str, Any]:
    """A copy of a state dict that shares its tensors; the state dict itself if it has names, or one is unknown."""
    groups = state["param_groups"]
    pairs = [pair for group, known in zip(groups, names) for pair in zip(group["params"], known)]
    name_of = {key: name for key, name in pairs if name is not None}
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, int) and key in name_of for key in keys):
        return state
    return {
        **state,
        "state": {name_of[key]: entry for key, entry in state["state"].items()},
        "param_groups": [{**group, "params": [name_of[key] for key in group["params"]]} for group in groups],
    }
