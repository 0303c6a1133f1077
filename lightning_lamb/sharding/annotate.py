"""Names and true shapes of parameters, recorded while the module that knows them is at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WRAPPER_PREFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
"""What FSDP1, activation checkpointing, torch.compile and Lightning put into parameter names."""


@dataclass(frozen=True)
class Annotation:
    """What a module knew about a parameter.

    Attributes:
        name: the name in the module, without the wrappers' prefixes.
        shape: the true shape, where the parameter itself shows only a slice (FSDP1); None where it tells the truth.
        group: the ranks that hold the other slices; None where the parameter is whole.
    """

    name: str
    shape: tuple[int, ...] | None = None
    group: ProcessGroup | None = None


# Weak, and by identity: a parameter takes its annotation with it when it dies, and tensors do not compare as keys.
_ANNOTATIONS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def clean_name(name: str) -> str:
    """``name`` without the prefixes that wrappers add.

    >>> clean_name("_fsdp_wrapped_module.net._orig_mod.0.weight")
    'net.0.weight'
    """
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def annotate(module: nn.Module) -> int:
    """Records the name of every parameter of ``module``, and under FSDP1 its true shape and process group.

    Call it after wrapping and before the first ``step()``; `LambMixin`, `LargeBatch` and `LambCLI` do. FSDP1 shows the
    optimizer 1-D, possibly empty slices, and only the wrapped module knows what they are slices of. Needed nowhere
    else, but then trust ratios are reported by name. Idempotent; no communication.

    Args:
        module: the (wrapped) model.

    Returns:
        The number of parameters recorded.

    Raises:
        UnknownShardError: FSDP1 with ``use_orig_params=False``, where layers are invisible.
    """
    from lightning_lamb.sharding.fsdp1 import flat_slices

    names = {id(parameter): clean_name(name) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        known = _ANNOTATIONS.get(parameter, Annotation(name))
        # A module inside the FSDP1 one knows better names, but not what the outer unit cut: that is kept.
        _ANNOTATIONS[parameter] = replace(known, name=names[id(parameter)])
    for piece, shape, group, name in flat_slices(module):
        _ANNOTATIONS[piece] = Annotation(names.get(id(piece), clean_name(name)), shape, group)
    return len(names)


def annotate_slice(
    parameter: Tensor, name: str, shape: tuple[int, ...], group: ProcessGroup | None, cut: bool = True
) -> None:
    """Records what a slice that somebody cut out of a layer is a slice of.

    Args:
        parameter: the slice, as the optimizer will see it.
        name: the layer's.
        shape: the layer's.
        group: the ranks that hold the other slices; None is all ranks.
        cut: False if ``parameter`` has all elements of the layer.
    """
    if cut and group is None:
        group = torch.distributed.group.WORLD
    _ANNOTATIONS[parameter] = Annotation(name, shape, group if cut else None)


def record_name(parameter: Tensor, name: str) -> None:
    """Records the name of a parameter that shows its own shape."""
    _ANNOTATIONS[parameter] = Annotation(clean_name(name))


def annotation(parameter: Tensor) -> Annotation | None:
    """What `annotate` recorded of ``parameter``, or None."""
    return _ANNOTATIONS.get(parameter)


def true_name(parameter: Tensor) -> str | None:
    """The parameter's name in its module, or None if no module was annotated."""
    known = annotation(parameter)
    return None if known is None else known.name


def true_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole layer, also where ``parameter`` is a slice of it (FSDP1, ZeRO-3, DTensor).

    Args:
        parameter: a parameter as its module shows it.

    Raises:
        UnknownShardError: a slice that nobody annotated.
    """
    from lightning_lamb.sharding.fsdp1 import refuse_unannotated

    known = annotation(parameter)
    if known is not None and known.shape is not None:
        return known.shape
    refuse_unannotated(parameter, known.name if known else "a parameter")
    partitioned = getattr(parameter, "ds_shape", None)  # DeepSpeed ZeRO-3 empties the parameter, keeping its shape here
    return tuple(parameter.shape if partitioned is None else partitioned)
