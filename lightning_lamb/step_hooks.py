"""Calls a method after every step of an optimizer, where torch can, without keeping the method's owner alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class _Hook:
    """What torch calls after a step."""

    def __init__(self, method: Callable[[Optimizer], None]) -> None:
        self.method = weakref.WeakMethod(method)

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        method = self.method()
        if method is not None:
            method(optimizer)


def after_each_step(optimizer: Optimizer, method: Callable[[Optimizer], None]) -> RemovableHandle | None:
    """Has a bound method called after every step of an optimizer, for as long as its owner lives.

    Optimizers outlive schedulers and callbacks: a second ``fit`` with the same optimizer brings others.

    Args:
        optimizer: whose steps are meant; hooks of owners that are gone are taken out of it.
        method: called with the optimizer.

    Returns:
        Takes the hook out again. None where torch calls no hooks, so that steps cannot be counted: a wrapper around
        another optimizer that does not run ``Optimizer.__init__`` (many implementations of Lookahead).
    """
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if hooks is None or not hasattr(optimizer.step, "hooked"):
        return None
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.method() is None]:
        del hooks[key]
    handle: RemovableHandle = optimizer.register_step_post_hook(_Hook(method))
    return handle
