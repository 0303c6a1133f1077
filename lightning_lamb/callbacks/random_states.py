"""The states of all random number generators of this process, and the one stream of random numbers that training has.

Validation, other callbacks and the making of dataloaders draw random numbers too, and not the same ones in a run that
was resumed. So what training draws (dropout, say) continues where the last micro-batch left it, whatever was drawn in
between.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
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
        python_words: Python's state as it lies in memory, to write it back; None where it cannot be read.
        numpy_words: NumPy's, likewise.
        python_mark: of `python_words`, see `_mark_at`.
        numpy_mark: of `numpy_words`.
    """

    torch_state: Tensor
    python_state: Any
    numpy_state: Any = None
    device_state: Tensor | None = None
    python_words: bytes | None = None
    numpy_words: bytes | None = None
    python_mark: bytes | None = None
    numpy_mark: bytes | None = None

    @classmethod
    def now(cls, device: torch.device | None = None, earlier: RandomStates | None = None) -> RandomStates:
        """The present states. Reads no accelerator memory: CUDA's generator lives on the host.

        Args:
            device: where the module computes; None: only the host's generators.
            earlier: a snapshot that what has not moved is taken from: reading Python's state takes 7 µs, NumPy's 23.
        """
        found: dict[str, Any] = {} if earlier is None else dict(vars(earlier))
        found["torch_state"], found["device_state"] = torch.get_rng_state(), _device_state(device)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            address = _numpy_address(numpy)
            mark = _mark_at(address, NUMPY_MARK)
            if earlier is None or not earlier.has_numpy_mark(mark):
                found["numpy_state"] = numpy.random.get_state()
                found["numpy_words"], found["numpy_mark"] = _words_at(address), mark
        address = _python_address()
        mark = _mark_at(address, PYTHON_MARK)
        if earlier is None or not earlier.has_python_mark(mark):
            found["python_state"] = random.getstate()
            found["python_words"], found["python_mark"] = _words_at(address), mark
        made = object.__new__(cls)
        made.__dict__.update(found)  # a frozen dataclass takes 4 µs to set ten attributes, at every micro-batch
        return made

    def restore(self, device: torch.device | None = None, present: RandomStates | None = None) -> None:
        """Makes these the present states.

        Args:
            device: where the module computes; None: only the host's generators.
            present: a snapshot of what is there now, if there is one: Mersenne twisters are then written in memory.
        """
        torch.set_rng_state(self.torch_state)
        address = _python_address()
        if not self.has_python_mark(mark := _mark_at(address, PYTHON_MARK)) and not (
            present is not None and present.has_python_mark(mark) and _write(address, self.plain_python_words)
        ):
            random.setstate(self.python_state)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy_state is not None:
            address = _numpy_address(numpy)
            if not self.has_numpy_mark(mark := _mark_at(address, NUMPY_MARK)) and not (
                present is not None and present.has_numpy_mark(mark) and _write(address, self.plain_numpy_words)
            ):
                numpy.random.set_state(self.numpy_state)
        if self.device_state is None or device is None:
            return
        if device.type == "cuda":
            torch.cuda.set_rng_state(self.device_state, device)
        elif device.type == "mps":
            torch.mps.set_rng_state(self.device_state)

    def has_python_mark(self, mark: bytes | None) -> bool:
        """Whether Python's generator is in this state, if its mark in memory is ``mark``.

        Not to be told while a second normal number lies ready: giving it away does not move the words.
        """
        return mark is not None and mark == self.python_mark and self.plain_python_words is not None

    def has_numpy_mark(self, mark: bytes | None) -> bool:
        """Whether NumPy's generator is in this state, if its mark in memory is ``mark``; see above."""
        return mark is not None and mark == self.numpy_mark and self.plain_numpy_words is not None

    @property
    def plain_python_words(self) -> bytes | None:
        """The words, where they are all of the state."""
        return self.python_words if self.python_state[2] is None else None

    @property
    def plain_numpy_words(self) -> bytes | None:
        """The words, where they are all of the state."""
        return None if self.numpy_state is None or self.numpy_state[3] else self.numpy_words

    def pack(self) -> dict[str, Any]:
        """As tensors, numbers and None, which ``torch.load(weights_only=True)`` reads."""
        version, words, gauss = self.python_state
        packed: dict[str, Any] = {
            "torch": self.torch_state.clone(),
            "python": torch.tensor(words, dtype=torch.int64, device="cpu"),
            "python_version": version,
            "python_gauss": gauss,
        }
        if self.numpy_state is not None and self.numpy_state[0] == "MT19937":
            _, keys, position, has_gauss, cached = self.numpy_state
            packed["numpy"] = torch.tensor(keys.tolist(), dtype=torch.int64, device="cpu")
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


def _device_state(device: torch.device | None) -> Tensor | None:
    """The state of an accelerator's generator, where it can be read."""
    if device is None or device.type == "cpu":
        return None
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


TWISTER_BYTES = 624 * 4 + 4
"""Size of the state of a Mersenne twister, of Python's as of NumPy's: key and position."""


PYTHON_MARK, NUMPY_MARK = 0, 624 * 4 - 8
"""Where the mark begins: Python keeps the position before the key, NumPy behind it."""


def _words_at(address: int | None) -> bytes | None:
    """The state of a Mersenne twister as it lies in memory."""
    return None if address is None else ctypes.string_at(address, TWISTER_BYTES)


def _mark_at(address: int | None, begin: int) -> bytes | None:
    """Position and two words of the key of a Mersenne twister.

    Every number that is drawn moves the position, and after 624 of them, as after seeding, all words are others.
    """
    return None if address is None else ctypes.string_at(address + begin, 12)


def _write(address: int | None, words: bytes | None) -> bool:
    """Writes the state of a Mersenne twister, and tells whether that was possible."""
    if address is None or words is None:
        return False
    ctypes.memmove(address, words, TWISTER_BYTES)
    return True


def _numpy_address(numpy: Any) -> int | None:
    """Where NumPy's global generator keeps key and position; None where they cannot be found."""
    return _address_of(getattr(getattr(numpy.random.mtrand, "_rand", None), "_bit_generator", None))


@functools.lru_cache(maxsize=1)
def _address_of(generator: Any) -> int | None:
    """Where a bit generator of NumPy keeps key and position, if it is a Mersenne twister."""
    if type(generator).__name__ != "MT19937":
        return None
    address = int(generator.ctypes.state_address)
    state = generator.state["state"]
    expected = state["key"].tobytes() + int(state["pos"]).to_bytes(4, sys.byteorder)
    return address if _words_at(address) == expected else None


@functools.lru_cache(maxsize=1)
def _python_address() -> int | None:
    """Where CPython's ``random`` keeps position and key; None where they cannot be found."""
    generator = getattr(random, "_inst", None)
    if type(generator) is not random.Random or sys.implementation.name != "cpython":
        return None
    if random.Random.__base__.__basicsize__ < object.__basicsize__ + TWISTER_BYTES:  # type: ignore[union-attr]
        return None
    address = id(generator) + object.__basicsize__
    *key, position = generator.getstate()[1]
    expected = b"".join(int(word).to_bytes(4, sys.byteorder) for word in (position, *key))
    return address if _words_at(address) == expected else None


def mixed_seed(*parts: int) -> int:
    """A seed that depends on all numbers, such as a rank's seed, the epoch and a pass: 63 bits, evenly spread."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def present_seed() -> int:
    """A seed that depends on the present state of torch's generator, which does not move: what a sampler would draw."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


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
        self._outside: RandomStates | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """What is drawn inside continues where the last use ended."""
        self._outside = outside = RandomStates.now(earlier=self._outside)
        if self._states is None:
            seed_all(self._seed)
        else:
            self._states.restore(present=outside)
        try:
            yield
        finally:
            self._states = RandomStates.now(earlier=self._states)
            outside.restore(present=self._states)


class TrainingRandomness:
    """The stream of random numbers that micro-batches draw from.

    Attributes:
        window_start: the states before the first micro-batch of the open window.
        device: where the module computes.
    """

    def __init__(self, device: torch.device, states: RandomStates | None) -> None:
        self.device = device
        self.window_start = RandomStates.now(device) if states is None else states
        self._latest = self.window_start
        self._pending = True

    def leave(self, *, closes_window: bool) -> None:
        """Keeps the states at the end of a micro-batch."""
        self._latest, self._pending = RandomStates.now(self.device, self._latest), True
        if closes_window:
            self.window_start = self._latest

    def enter(self) -> None:
        """Restores the states of the last `leave`, once: call it before the next batch is fetched."""
        if self._pending:
            self._pending = False
            self._latest.restore(self.device)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Batches that are fetched inside, and forgotten, leave the states as they are."""
        pending, self._pending = self._pending, False
        states = RandomStates.now(self.device, self._latest)
        try:
            yield
        finally:
            states.restore(self.device)
            self._pending = pending

    def now_or_at_start(self, *, closed: bool) -> RandomStates:
        """The states to continue with.

        Args:
            closed: no window is open; otherwise those before it are meant, not those after the last micro-batch.
        """
        if not closed or (self._pending and self._latest is self.window_start):
            return self.window_start
        return RandomStates.now(self.device)
