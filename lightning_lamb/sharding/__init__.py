"""Which slice is here? One file per answer; `locate` asks them in turn."""

from __future__ import annotations

from torch import Tensor

from lightning_lamb.sharding import dtensor, fsdp1, zero
from lightning_lamb.sharding.annotate import annotate, annotate_slice, annotation, clean_name, true_name, true_shape
from lightning_lamb.sharding.dtensor import completed_gradients, is_dtensor, refuse_plain_gradient
from lightning_lamb.sharding.fsdp2 import annotate_fully_sharded
from lightning_lamb.sharding.layout import Layer, Locator, Piece, Split
from lightning_lamb.sharding.norms import GlobalNorm, NormTable, gather_by_name
from lightning_lamb.sharding.replaced import replacing_module

__all__ = [
    "LOCATORS",
    "GlobalNorm",
    "Layer",
    "Locator",
    "NormTable",
    "Piece",
    "Split",
    "annotate",
    "annotate_fully_sharded",
    "annotate_slice",
    "annotation",
    "clean_name",
    "completed_gradients",
    "gather_by_name",
    "is_dtensor",
    "locate",
    "refuse_plain_gradient",
    "replacing_module",
    "true_name",
    "true_shape",
    "zero",
]

LOCATORS: list[Locator] = [dtensor.locate, fsdp1.locate, zero.locate]
"""Tried in order; the first that knows the layout answers."""


def locate(parameter: Tensor, name: str) -> list[Piece]:
    """The pieces of layers inside one optimizer parameter.

    Args:
        parameter: as it stands in a parameter group.
        name: for messages and for reports by name.

    Returns:
        One piece, the whole layer, unless a locator says otherwise.

    Raises:
        UnknownShardError: a layout that cannot be seen through.
    """
    for locator in LOCATORS:
        pieces = locator(parameter, name)
        if pieces is not None:
            return pieces
    # true_shape: a whole parameter, except for what ZeRO-3 keeps beside the emptied tensor.
    return [Piece(Layer(name, true_shape(parameter)))]
