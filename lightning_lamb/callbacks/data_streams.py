"""Dataloaders that decide the order of their data themselves, iterated so that a pass can be repeated.

What such a loader draws from the global random numbers becomes a function of seed, epoch and pass; a resumed run
iterates over what was seen already and draws the same numbers. A loader with a state continues by itself, and here is
only told when a pass begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from lightning_lamb.callbacks.order_seeds import LoaderOrder, Pass
from lightning_lamb.callbacks.random_states import PrivateRandomness, TrainingRandomness

MAKES_ITERATOR = "_get_iterator"
"""DataLoader's method that makes an iterator: torch offers no other way to reach a loader inside a loader."""


def is_stateful(loader: Any) -> bool:
    """Whether a loader keeps its position itself."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class Fetches:
    """The iterator of one pass.

    Args:
        inner: the loader's own.
        before: called before each fetch.
        this: the pass.
    """

    def __init__(self, inner: Iterator[Any], before: Callable[[], None], this: Pass) -> None:
        self._inner, self._before, self._pass = inner, before, this

    def __iter__(self) -> Fetches:
        """Itself."""
        return self

    def __next__(self) -> Any:
        """The next batch."""
        self._before()
        try:
            return next(self._inner)
        except StopIteration:
            self._pass.is_finished = True
            raise

    def __len__(self) -> int:
        """Batches in a whole pass."""
        return len(self._inner)  # type: ignore[arg-type]


class PrivateFetches(Fetches):
    """The iterator of one pass, whose fetches draw from random numbers of their own."""

    def __init__(self, inner: Iterator[Any], private: PrivateRandomness, this: Pass) -> None:
        super().__init__(inner, lambda: None, this)
        self._private = private

    def __next__(self) -> Any:
        """The next batch."""
        with self._private():
            return super().__next__()


class ContinuedFetches(Fetches):
    """The iterator of one pass, or of the rest of one, of a loader with a state; fetches draw training's numbers."""

    def __init__(
        self, inner: Iterator[Any], before: Callable[[], None], this: Pass, private: PrivateRandomness
    ) -> None:
        super().__init__(inner, before, this)
        self._private: PrivateRandomness | None = private

    def __next__(self) -> Any:
        """The next batch."""
        private, self._private = self._private, None
        if private is None:
            return super().__next__()
        with _iterators_draw_from(private):
            return super().__next__()


@contextlib.contextmanager
def _iterators_draw_from(private: PrivateRandomness) -> Iterator[None]:
    """The iterators of DataLoaders that are made inside draw the seed of their workers from ``private``.

    A stateful loader that is a generator makes the DataLoader inside it when the first batch is fetched, once more in a
    resumed run: drawn from training's numbers, that seed would move them.
    """
    make = getattr(DataLoader, MAKES_ITERATOR)

    def apart(loader: Any) -> Any:
        with private():
            return make(loader)

    setattr(DataLoader, MAKES_ITERATOR, apart)
    try:
        yield
    finally:
        setattr(DataLoader, MAKES_ITERATOR, make)


class LoaderProxy:
    """Stands for a user's own loader: everything but iterating is the loader's.

    Args:
        loader: any iterable.
        part: its seeds.
    """

    def __init__(self, loader: Any, part: LoaderOrder) -> None:
        self.__dict__.update(_proxied=loader, _part=part)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The loader's, so that ``isinstance`` tells what it is."""
        return type(self.__dict__["_proxied"])

    def __getattr__(self, name: str) -> Any:
        """What the loader has."""
        return getattr(self.__dict__["_proxied"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets the loader's."""
        setattr(self.__dict__["_proxied"], name, value)

    def __len__(self) -> int:
        """Batches in a pass; a TypeError, as of the loader itself, where it has no length."""
        return len(self.__dict__["_proxied"])


class StreamedLoader(LoaderProxy):
    """A loader whose passes draw from random numbers of their own."""

    def __iter__(self) -> Iterator[Any]:
        """One pass."""
        part: LoaderOrder = self.__dict__["_part"]
        this = part.begin()
        private = PrivateRandomness(part.stream_seed())
        with private():
            inner = iter(self.__dict__["_proxied"])
        return PrivateFetches(inner, private, this)


class ContinuedLoader(LoaderProxy):
    """A loader with a state. Its passes begin alike in every run; what it draws in a fetch is training's."""

    def __init__(self, loader: Any, part: LoaderOrder, randomness: TrainingRandomness) -> None:
        super().__init__(loader, part)
        self.__dict__.update(_randomness=randomness, _held=None)

    def __iter__(self) -> Iterator[Any]:
        """One pass, or the rest of one."""
        part: LoaderOrder = self.__dict__["_part"]
        part.begin()
        held, self.__dict__["_held"] = self.__dict__["_held"], None
        if held is not None:
            return self.continue_with(held)
        with PrivateRandomness(part.stream_seed())():
            inner = iter(self.__dict__["_proxied"])
        return self.continue_with(inner)

    def continue_with(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Goes on with an iterator that exists already: a second one would begin anew."""
        part: LoaderOrder = self.__dict__["_part"]
        private = PrivateRandomness(part.stream_seed())
        return ContinuedFetches(iterator, self.__dict__["_randomness"].enter, part.current, private)

    def keep_iterator(self, iterator: Iterator[Any]) -> None:
        """Keeps an iterator for the next pass."""
        self.__dict__["_held"] = iterator

    def state_dict(self) -> Any:
        """The loader's."""
        return self.__dict__["_proxied"].state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Sets the loader's."""
        self.__dict__["_proxied"].load_state_dict(state)


def streamed(loader: Any, part: LoaderOrder) -> Any:
    """A loader without a state; an iterator, which has one pass only, is returned as it is."""
    return loader if type(loader) is StreamedLoader or hasattr(loader, "__next__") else StreamedLoader(loader, part)


def continued(loader: Any, part: LoaderOrder, randomness: TrainingRandomness) -> Any:
    """A loader with a state."""
    return loader if type(loader) is ContinuedLoader else ContinuedLoader(loader, part, randomness)
