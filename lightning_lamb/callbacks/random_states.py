"""The states of all random number generators of this process, and the one stream of random numbers that training has.

Validation, other callbacks and the making of dataloaders draw random numbers too, and not the same ones in a run that
was resumed. So what training draws (dropout, say) continues where the last micro-batch left it, whatever was drawn in
between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RandomStates:
    """Snapshot of torch's, Python's and NumPy's generators, and of the accelerator's.

    Attributes:
        torch_state: of the CPU.
        python_state: of the ``random`` module.
        numpy_state: None where NumPy is not in use.
        device_state: None on the CPU, and on accelerators without a readable generator.
    """

    torch_state: Tensor
    python_state: Any
    numpy_state: Any = None
    device_state: Tensor | None = None

    @classmethod
    def now(cls, device: torch.device | None = None) -> RandomStates:
        """The present states. Reads no accelerator memory: CUDA's generator lives on the host.

        Args:
            device: where the module computes; None: only the host's generators.
        """
        numpy = sys.modules.get("numpy")
        state = None
        if device is not None and device.type == "cuda":
            state = torch.cuda.get_rng_state(device)
        elif device is not None and device.type == "mps":
            state = torch.mps.get_rng_state()
        return cls(
            torch.get_rng_state(),
            random.getstate(),
            None if numpy is None else numpy.random.get_state(),
            state,
        )

    def restore(self, device: torch.device | None = None) -> None:
        """Makes these the present states."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy_state is not None:
            numpy.random.set_state(self.numpy_state)
        if self.device_state is None or device is None:
            return
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.device_state, device)
        elif device.type == "mps":
            torch.mps.set_rng_state(self.device_state)

    def pack(self) -> dict[str, Any]:
        """As tensors, numbers and None, which ``torch.load(weights_only=True)`` reads."""
        version, words, gauss = self.python_state
        packed: dict[str, Any] = {
            "torch": self.torch_state.clone(),
            "python": torch.tensor(words, dtype=torch.int64),
            "python_version": version,
            "python_gauss": gauss,
        }
        if self.numpy_state is not None and self.numpy_state[0] == "MT19937":
            _, keys, position, has_gauss, cached = self.numpy_state
            packed["numpy"] = torch.tensor(keys.tolist(), dtype=torch.int64)
            packed["numpy_rest"] = [int(position), int(has_gauss), float(cached)]
        if self.device_state is not None:
            packed["device"] = self.device_state.clone()
        return packed

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> RandomStates:
        """The inverse of `pack`."""
        words = tuple(packed["python"].tolist())
        numpy_state = None
        if "numpy" in packed:
            import numpy as np

            position, has_gauss, cached = packed["numpy_rest"]
            keys = np.array(packed["numpy"].tolist(), dtype=np.uint32)
            numpy_state = ("MT19937", keys, position, has_gauss, cached)
        device_state = packed.get("device")
        return cls(
            packed["torch"].cpu(),
            (packed["python_version"], words, packed["python_gauss"]),
            numpy_state,
            None if device_state is None else device_state.cpu(),
        )


def seed_all(seed: int) -> None:
    """Seeds the host's generators: torch's on the CPU, Python's and NumPy's."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


class PrivateRandomness:
    """Random numbers of their own, for code that draws from the global generators; those do not notice.

    Args:
        seed: decides them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: RandomStates | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """What is drawn inside continues where the last use ended."""
        outside = RandomStates.now()
        if self._states is None:
            seed_all(self._seed)
        else:
            self._states.restore()
        try:
            yield
        finally:
            self._states = RandomStates.now()
            outside.restore()


class TrainingRandomness:
    """The stream of random numbers that micro-batches draw from.

    Attributes:
        window_start: the states before the first micro-batch of the open window.
        device: where the module computes.
    """

    def __init__(self, device: torch.device, states: RandomStates | None) -> None:
        self.device = device
        self.window_start = RandomStates.now(device) if states is None else states
        self._pending: RandomStates | None = self.window_start

    def leave(self, *, closes_window: bool) -> None:
        """Keeps the states at the end of a micro-batch."""
        self._pending = RandomStates.now(self.device)
        if closes_window:
            self.window_start = self._pending

    def enter(self) -> None:
        """Restores the states of the last `leave`, once: call it before the next batch is fetched."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.restore(self.device)

    def now_or_at_start(self, *, closed: bool) -> RandomStates:
        """The states to continue with.

        Args:
            closed: no window is open; otherwise those before it are meant, not those after the last micro-batch.
        """
        if not closed or self._pending is self.window_start:
            return self.window_start
        return RandomStates.now(self.device)
