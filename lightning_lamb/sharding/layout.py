"""What a rank knows about the layers it holds pieces of.

LAMB is elementwise except for two norms per layer. So all that sharding has to answer is: which elements of which layer
are here, and which ranks hold the others?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer in the paper's sense: the tensor that gets one trust ratio.

    Attributes:
        name: the parameter's name in the module, or "group{i}.param{j}".
        shape: the true shape of the whole layer, whatever slice is here.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Split:
    """Which ranks hold the pieces of a layer: a process group, or axes of a device mesh.

    Attributes:
        group: the process group; None where ``mesh`` is given.
        mesh: the device mesh; None where ``group`` is given.
        axes: the axes of ``mesh`` along which the layer is cut; along the other axes every rank holds a copy.
    """

    group: ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    axes: tuple[int, ...] = ()


def _whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """The elements of one layer that this rank holds inside one optimizer parameter.

    Attributes:
        layer: which layer.
        view: maps any tensor laid out like the parameter (itself, its gradient, its state) to this piece, as a plain
            tensor that shares memory with it.
        split: where the other pieces are; None if the whole layer is here.
    """

    layer: Layer
    view: Callable[[Tensor], Tensor] = field(default=_whole)
    split: Split | None = None


def is_whole_view(piece: Piece) -> bool:
    """Whether the piece is simply all of its parameter, and no view need be taken to reach it."""
    return piece.view is _whole


Locator = Callable[[Any, str], "list[Piece] | None"]
"""``(parameter, name) -> pieces``, or None where the layout is not this locator's."""
