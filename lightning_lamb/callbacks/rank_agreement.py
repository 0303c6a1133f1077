"""Every rank must have derived the same numbers: compared before the first step, and a difference is named.

Ranks that disagree about the micro-batch or the accumulation would wait for each other forever, or average gradients of
different windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_lamb.errors import LightningLambError, RankDisagreementError
from lightning_lamb.lightning_rank_seams import gather_over_ranks
from lightning_lamb.lightning_seams import Trainer


def same_on_every_rank(trainer: Trainer, derive: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Derives numbers, and refuses on every rank if they differ, or if one rank cannot derive them.

    One gather of a few numbers per rank; nothing on one rank.

    Args:
        trainer: every rank calls this at the same place.
        derive: returns the numbers by the names that a message calls them.

    Returns:
        The numbers.

    Raises:
        RankDisagreementError: naming the first number that differs with each rank's, or what another rank could not do.
    """
    if trainer.world_size == 1:
        return derive()
    failure: LightningLambError | None = None
    numbers: Mapping[str, Any] = {}
    try:
        numbers = derive()
    except LightningLambError as error:
        failure = error
    texts = {name: comparable(value) for name, value in numbers.items()}
    everyone = gather_over_ranks(trainer, (None if failure is None else str(failure), texts))
    if failure is not None:
        raise failure
    for rank, (text, _) in enumerate(everyone):
        if text is not None:
            raise RankDisagreementError(f"rank {rank} cannot train like this, so no rank does: {text}")
    for name in numbers:
        values = [str(theirs.get(name)) for _, theirs in everyone]
        if len(set(values)) > 1:
            shown = "; ".join(f"{value} on {_ranks(values, value)}" for value in dict.fromkeys(values))
            raise RankDisagreementError(
                f"the ranks disagree about {name}: {shown}. Every rank must train with the same: give LargeBatch and "
                "the data the same options on all of them."
            )
    return numbers


def comparable(value: Any) -> str:
    """A text that is the same in every process where the value is: sets in order, no addresses of objects.

    Args:
        value: a number, text, or list, dict or set of such; of anything else the class is compared.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {comparable(part)}" for key, part in value.items()) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(comparable, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(comparable, value)) + "]"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _ranks(values: list[str], value: str) -> str:
    """Which ranks have a value."""
    ranks = [rank for rank, other in enumerate(values) if other == value]
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
