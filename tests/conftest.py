"""Shared by all tests: one thread per process, a fixed seed, no leftovers of torch.compile."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; two cores serve several test processes

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it when it is first imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    os.environ.pop("PL_GLOBAL_SEED", None)  # a test that called seed_everything would seed those after it
