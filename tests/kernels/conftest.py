"""The kernels under test by name; Triton's in its interpreter, where there is no GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from lightning_lamb.kernels import cpu, cpu_library, eager, foreach

WITHOUT_TRITON = "triton is not installed (it comes with torch's CUDA builds; tests/run.sh installs it on Linux)"


def triton_kernel() -> Any:
    """The Triton kernel; on the CPU by Triton's interpreter, which tests/conftest.py switches on."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(WITHOUT_TRITON)
    from lightning_lamb.kernels import triton

    return triton


def cpu_kernel() -> Any:
    """The compiled CPU kernel; where there is a compiler, its absence is an error."""
    missing = cpu_library.missing_because()
    assert missing is None, missing
    return cpu


KERNELS = {"eager": lambda: eager, "foreach": lambda: foreach, "cpu": cpu_kernel, "triton": triton_kernel}


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Any:
    """The kernel that the test names, by indirect parametrization."""
    return KERNELS[request.param]()


@pytest.fixture
def threads() -> Any:
    """Sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
