"""`uncompiled`: functions that ``torch.compile`` leaves alone, without importing torch's compiler before one is called.

``torch.compiler.disable`` imports the compiler, and Triton where it is installed, when it decorates. That would make
``import lightning_lamb`` slower than ``import torch``. torch's own optimizers import the compiler in their first step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function, *, recursive: bool = True) -> Function:
    """The function behind a graph break.

    Args:
        function: to be run as it is.
        recursive: leave the functions that it calls alone, too.
    """
    # What torch decorates its own optimizers with.
    lazily: Function = torch._disable_dynamo(function, recursive=recursive)  # type: ignore[assignment,attr-defined]  # noqa: SLF001
    return lazily
