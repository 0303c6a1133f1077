"""What a training's data depends on besides seeds and position: state of the user's own objects, in no checkpoint."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch.utils.data import DistributedSampler

PLAIN = (bool, int, float, str)
"""Types of attributes that can be compared cheaply, a counter of epochs, say."""


class UnsavedState:
    """Notices attributes of dataloaders, samplers and datasets that change in training and are saved nowhere.

    A generator of their own, a counter of passes: a resumed run has them as they were made.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[Any, str, Any]] = []
        self._found: dict[str, None] = {}

    def watch(self, loaders: list[Any]) -> None:
        """Remembers how they are. What was watched before is let go of.

        Args:
            loaders: of training, before they are iterated.
        """
        self.changed()
        owners = [owner for loader in loaders if not hasattr(loader, "state_dict") for owner in _owners(loader)]
        self._watched = [(owner, name, state) for owner in owners for name, state in _states(owner)]

    def changed(self) -> list[str]:
        """What has changed, in words, each once."""
        for owner, name, before in self._watched:
            if dict(_states(owner)).get(name, before) != before:
                self._found[f"{type(owner).__name__}.{name} changes in training and is in no checkpoint"] = None
        return list(self._found)


def _owners(loader: Any) -> list[Any]:
    """The objects that decide what a loader gives, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [loader, batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "sampler", None)]
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and all(dataset is not other for other in found):  # a Subset has a dataset
        found += [dataset, getattr(dataset, "transform", None)]
        dataset = getattr(dataset, "dataset", None)
    wrapped = [getattr(getattr(owner, "dataset", None), "_sampler", None) for owner in found]
    distinct = {id(owner): owner for owner in (*found, *wrapped) if hasattr(owner, "__dict__")}
    return list(distinct.values())


def _states(owner: Any) -> list[tuple[str, Any]]:
    """Names and comparable states of the attributes that may matter."""
    of_torch = type(owner).__module__.startswith(("torch.utils.data", "lightning.", "pytorch_lightning."))
    if of_torch or isinstance(owner, (type, DistributedSampler)):
        return []
    has_epoch = callable(getattr(owner, "set_epoch", None))
    pairs = []
    for name, value in vars(owner).items():
        if name.startswith("_DataLoader__") or (has_epoch and name in ("epoch", "_epoch")):
            continue
        state = _state_of(value, handled=name == "generator")
        if state is not None:
            pairs.append((name, state))
    return pairs


def _state_of(value: Any, *, handled: bool) -> Any:
    """A state that can be compared later; None for what is not looked at."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Generator):
        return None if handled else value.get_state().tolist()
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return repr(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return repr(value.get_state(legacy=False))
    return None
