"""Counts every collective that a piece of code issues, whoever calls it and through whatever interface."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CountCollectives(TorchDispatchMode):
    """``with CountCollectives() as counted: ...``; then ``counted.counts`` is e.g. ``{"allreduce_": 1}``.

    Every collective of torch.distributed, functional or not, passes the dispatcher as an operator of one of two
    namespaces; waiting for a functional one is no collective.
    """

    NAMESPACES = ("c10d", "_c10d_functional")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in self.NAMESPACES and "wait_tensor" not in str(func):
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())
