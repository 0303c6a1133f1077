"""FSDP2 (``fully_shard``): its parameters are DTensors, see `dtensor`; here is only how they get back their names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_lamb.sharding.annotate import annotation, record_name
from lightning_lamb.sharding.dtensor import is_dtensor


def annotate_fully_sharded(parameters: Sequence[Any]) -> None:
    """Records the names that ``fully_shard`` knows of parameters whose names nobody else has recorded.

    Args:
        parameters: of an optimizer, after the first forward pass, at which FSDP2 learns the names.
    """
    unnamed = {id(parameter): parameter for parameter in parameters if is_dtensor(parameter) and not _known(parameter)}
    if not unnamed:
        return
    for parameter, name in _names():
        if id(parameter) in unnamed:
            record_name(parameter, name)


def _known(parameter: Any) -> bool:
    return annotation(parameter) is not None


def _names() -> Iterator[tuple[Any, str]]:
    """What torch keeps of every module that was given to ``fully_shard``; nothing where it keeps that elsewhere."""
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    for reference in list(states.values()):
        state = reference() if callable(reference) else None
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for held in getattr(group, "fsdp_params", ()):
                name = getattr(held, "_param_fqn", None)
                if name:
                    yield held.sharded_param, name
