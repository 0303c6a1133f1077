"""Where in a batch its number of samples can be read: lengths of lists, the first two dimensions of tensors.

Nothing here knows which of these sizes it is; `lightning_lamb.callbacks.sample_counts` finds that out.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

LENGTH = "length"
DECLARED = ("num_graphs", "batch_size")
"""Attributes by which batch objects (PyTorch Geometric's, DGL's, TensorDict) tell how many samples they hold."""

LONGEST_LIST, DEEPEST = 16, 6


@dataclasses.dataclass(frozen=True)
class Place:
    """One size in a batch.

    Attributes:
        keys: how to get from the batch to the part: (is_attribute, key) of every step.
        kind: a dimension of the part, "length", or the name of an attribute that tells the size.
    """

    keys: tuple[tuple[bool, Any], ...]
    kind: int | str

    def read(self, batch: Any) -> int | None:
        """The size in this batch, or None if it has no such part."""
        try:
            value = batch
            for is_attribute, key in self.keys:
                value = getattr(value, key) if is_attribute else value[key]
            kind = self.kind
            if isinstance(kind, int):  # at every micro-batch, so the common case comes first
                return value.size(kind) if isinstance(value, Tensor) else int(_shape(value)[kind])
            return len(value) if kind == LENGTH else declared_size(value)
        except (AttributeError, IndexError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        """As one would write it in Python."""
        path = "batch" + "".join(f".{key}" if attribute else f"[{key!r}]" for attribute, key in self.keys)
        if self.kind == LENGTH:
            return f"len({path})"
        return f"{path}.{self.kind}" if isinstance(self.kind, str) else f"{path}.shape[{self.kind}]"


def places(value: Any, dimensions: int = 2, keys: tuple[tuple[bool, Any], ...] = ()) -> dict[Place, int]:
    """All sizes in a batch by their places, outer ones first.

    Args:
        value: the batch, or a part of it.
        dimensions: of a tensor, how many of its first dimensions are looked at.
        keys: how one gets to ``value``.
    """
    if len(keys) > DEEPEST:
        return {}
    declared = declared_size(value)
    if declared is not None:
        return {Place(keys, _declaring(value)): declared}
    if _is_array(value):
        return {Place(keys, dimension): int(size) for dimension, size in enumerate(_shape(value)[:dimensions])}
    found: dict[Place, int] = {}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        found[Place(keys, LENGTH)] = len(value)
    for step, part in _parts(value):
        found.update(places(part, dimensions, (*keys, step)))
    return found


def shared_sizes(value: Any, dimensions: int = 2, depth: int = 0) -> set[int] | None:
    """The sizes that every part of a batch has, each in one of its dimensions or as its length.

    A list of like things may be one field per item or one sample per item, so both readings count; the outermost list
    is one of fields.

    Returns:
        None if there is nothing with a size: numbers, strings, tensors without a dimension.
    """
    declared = declared_size(value)
    if declared is not None:
        return {declared}
    if _is_array(value):
        return {int(size) for size in _shape(value)[:dimensions]} or None
    if depth > DEEPEST:
        return None
    parts = [part for _, part in _parts(value)]
    sizes = [size for part in parts if (size := shared_sizes(part, dimensions, depth + 1)) is not None]
    inner = set.intersection(*sizes) if sizes else None
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        return inner
    if inner is None:
        return {len(value)}
    alike = len({(type(part), len(_shape(part)) if _is_array(part) else 0) for part in parts}) == 1
    return inner | {len(value)} if alike and depth > 0 else inner


def declared_size(value: Any) -> int | None:
    """What an object that is no tensor, list or dict tells by itself."""
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if len(value.batch_sizes) else 0
    if value is None or isinstance(value, (Tensor, str, bytes, int, float, list, tuple, dict)):
        return None
    name = _declaring(value)
    return None if not name else _as_count(_attribute(value, name))


def _declaring(value: Any) -> str:
    """The name of the attribute that tells the size."""
    if isinstance(value, PackedSequence):
        return "batch_sizes[0]"
    return next((name for name in DECLARED if _as_count(_attribute(value, name)) is not None), "")


def _attribute(value: Any, name: str) -> Any:
    with contextlib.suppress(Exception):  # a property of somebody else's class
        return getattr(value, name, None)
    return None


def _as_count(size: Any) -> int | None:
    """A whole number; of TensorDict's shape, the first."""
    if isinstance(size, tuple):
        size = size[0] if size else None
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _is_array(value: Any) -> bool:
    """A tensor, or an array of NumPy's kind."""
    return isinstance(value, Tensor) or isinstance(getattr(value, "shape", None), tuple)


def _shape(value: Any) -> tuple[int, ...]:
    """The shape, of which a nested tensor has one dimension that is the same for all."""
    return (value.size(0),) if getattr(value, "is_nested", False) else value.shape


def _parts(value: Any) -> Iterator[tuple[tuple[bool, Any], Any]]:
    """What a batch consists of, with the step that leads there."""
    if isinstance(value, Mapping):
        yield from (((False, key), part) for key, part in value.items())
    elif isinstance(value, (str, bytes)) or value is None:
        return
    elif isinstance(value, Sequence):
        kept = value if len(value) <= LONGEST_LIST else value[:1]
        yield from (((False, index), part) for index, part in enumerate(kept))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield (True, field.name), getattr(value, field.name)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from (((True, name), part) for name, part in vars(value).items() if not name.startswith("_"))
