"""Hooks after an optimizer's steps do not keep their owners alive, and are not relied on where torch calls none."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lamb import Lamb, Lars, StagedWarmup
from lightning_lamb.optimizers import ShardedStateOptimizer
from lightning_lamb.step_hooks import after_each_step


class Counts:
    """Counts calls."""

    def __init__(self) -> None:
        self.steps = 0

    def note(self, _: Any) -> None:
        self.steps += 1


def with_gradient() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    return parameter


@pytest.mark.parametrize("kind", [Lamb, Lars, ShardedStateOptimizer, torch.optim.SGD])
def test_every_step_is_reported_until_the_hook_is_taken_out(kind: Any) -> None:
    optimizer, owner = kind([with_gradient()], lr=0.1), Counts()
    hook = after_each_step(optimizer, owner.note)
    assert hook is not None
    optimizer.step()
    optimizer.step()
    hook.remove()
    optimizer.step()
    assert owner.steps == 2


def test_an_owner_that_is_gone_is_not_kept_by_its_hook() -> None:
    """A scheduler for every ``fit`` with one optimizer: all of them stayed alive, and counted, as long as it did."""
    optimizer = Lamb([("weight", with_gradient())], lr=0.1)
    for _ in range(3):
        scheduler = StagedWarmup(optimizer, total_steps=4)
        scheduler.follow_optimizer()
        optimizer.step()
        scheduler.step()
    alive = weakref.ref(scheduler)
    assert scheduler.last_epoch == 1
    del scheduler
    optimizer.step = type(optimizer).step.__get__(optimizer)  # type: ignore[method-assign]  # torch's scheduler wrapped it
    gc.collect()
    assert alive() is None
    optimizer.step()
    assert after_each_step(optimizer, Counts().note) is not None
    assert len(optimizer._optimizer_step_post_hooks) == 1


def lookahead(inner: torch.optim.Optimizer, *, has_hooks: bool) -> torch.optim.Optimizer:
    """As timm and torch_optimizer write such wrappers: without ``Optimizer.__init__``, so that torch calls no hooks.

    Of a class of its own each time: torch's ``__setstate__`` changes the class.

    Args:
        inner: wrapped.
        has_hooks: whether it has the attributes in which torch keeps hooks, as timm's does.
    """

    class Lookahead(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.inner, self.defaults = inner, inner.defaults
            self.param_groups, self.state = inner.param_groups, inner.state
            if has_hooks:
                self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

    return Lookahead()


@pytest.mark.parametrize("has_hooks", [True, False])
def test_a_wrapper_without_hooks_is_recognised_and_its_schedule_goes_on(has_hooks: bool) -> None:
    wrapper = lookahead(torch.optim.SGD([with_gradient()], lr=0.1), has_hooks=has_hooks)
    assert after_each_step(wrapper, Counts().note) is None
    scheduler = StagedWarmup(wrapper, total_steps=4)
    scheduler.follow_optimizer()
    for _ in range(3):
        wrapper.step()
        scheduler.step()
    assert scheduler.last_epoch == 3
