"""Which DeepSpeed is here, and whether this package was tested with it."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from types import ModuleType

from lightning_lamb.errors import MissingDependencyError

OLDEST = (0, 19, 8)
BEFORE = (0, 20)
"""0.19.8 passes all tests. In 0.19.4, float32 at stage 3 sometimes gave wrong numbers or NaN, under torch's SGD too."""


def load_deepspeed() -> ModuleType:
    """Imports DeepSpeed; its log goes to stderr, so that what a program prints (``--print_config``) can be read.

    Raises:
        MissingDependencyError: it is not installed, or it is a version that was not tested.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):  # while it makes its log handler
            deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise  # installed, but something that it needs is not: that message is the better one
        raise MissingDependencyError(
            "lightning_lamb.deepspeed needs DeepSpeed, which is not installed: "
            '`pip install "lightning_lamb[deepspeed]"`. '
            "Install torch first; DS_BUILD_OPS=0 skips kernels that LAMB does not need."
        ) from error
    refuse_untested(str(deepspeed.__version__))
    return deepspeed


def refuse_untested(version: str) -> None:
    """Raises for a version outside the tested range.

    Raises:
        MissingDependencyError: naming both.

    >>> refuse_untested("0.19.8")
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not OLDEST <= numbers < BEFORE:
        wanted = f">={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BEFORE))}"
        raise MissingDependencyError(
            f"DeepSpeed {version} is installed; lightning_lamb reads how it lays out partitions and was tested with "
            f'{wanted}: `pip install "deepspeed{wanted}"`.'
        )
