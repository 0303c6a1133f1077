"""An optimizer inside DeepSpeed, which swaps its parameters, steps it part by part and reloads it in ways of its own.

`Host` stays passive until a parameter group holds a tensor that the optimizer was not built with. Nothing of DeepSpeed
is imported.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_lamb.errors import ConflictError, InvalidOptionError, StateDictError
from lightning_lamb.optimizers import state
from lightning_lamb.optimizers.report import LayerReport
from lightning_lamb.sharding import annotate, annotation, clean_name, zero

if TYPE_CHECKING:
    from lightning_lamb.optimizers.layerwise import LayerwiseOptimizer

GROUPS_KEY = "zero_groups"
"""In saved parameter groups: [this group's index, the options of all groups]. See `Host.heal`."""


@dataclass
class Members:
    """A parameter group and the parameters it was built with, by weak reference."""

    group: dict[str, Any]
    originals: list[weakref.ref[Tensor]]

    def named(self, index: int) -> list[tuple[str, Tensor]]:
        """Names and those parameters that still exist."""
        names = self.group.get("param_names") or []
        found = []
        for position, reference in enumerate(self.originals):
            parameter = reference()
            if parameter is None:
                continue
            known = annotation(parameter)
            if len(names) == len(self.originals):
                name = clean_name(names[position])
            else:
                name = known.name if known is not None else f"group{index}.param{position}"
            found.append((name, parameter))
        return found


class Host:
    """What an optimizer remembers of the parameters it was built with, and does once DeepSpeed swapped them.

    Attributes:
        active: whether they were swapped.
    """

    def __init__(self) -> None:
        self.active = False
        self._asked_engine = False
        self._members: list[Members] = []
        self._originals: dict[int, weakref.ref[Tensor]] = {}
        self._reports: dict[Any, LayerReport] = {}

    def remember(self, group: dict[str, Any]) -> None:
        """Notes a new parameter group; DeepSpeed drops empty ones."""
        if not group["params"]:
            return
        references = [weakref.ref(parameter) for parameter in group["params"]]
        self._members.append(Members(group, references))
        self._originals.update((id(parameter), reference) for parameter, reference in zip(group["params"], references))

    def regroup(self, groups: Sequence[dict[str, Any]]) -> None:
        """Notes that loading a state dict replaced the group dictionaries, in order."""
        if not self._members:  # unpickled
            for group in groups:
                self.remember(group)
        elif len(groups) == len(self._members):
            for members, group in zip(self._members, groups):
                members.group = group

    # ------------------------------------------------------------------------------------------------------ the step

    def before_step(self, optimizer: LayerwiseOptimizer) -> bool:
        """Prepares what DeepSpeed is about to step.

        Returns:
            True where this is DeepSpeed's trial step with zero gradients, which only allocates state: it must neither
            count nor decay weights.

        Raises:
            ConflictError: ``max_grad_norm``: a norm over all gradients, where only a part of them is here.
            InvalidOptionError: see `refuse_unsupported_options`.
        """
        groups = optimizer.param_groups
        self.active = self.active or self._swapped(groups)
        if not self.active:
            return False
        self.heal(groups)
        for group in groups:
            refuse_unsupported_options(group)
        fresh = []
        for owner, parameter in [(group, parameter) for group in groups for parameter in group["params"]]:
            found = optimizer.state[parameter]
            if "exp_avg" not in found and parameter.grad is not None:
                state.prepare(found, parameter, owner, optimizer.base == "adam", "a tensor of DeepSpeed")
                fresh.append(parameter)
            if optimizer.base != "adam":
                found.pop("exp_avg_sq", None)  # see `marked`
            # An int, because the loader of ZeRO 3 puts one and the same tensor into the states of all sub-groups.
            if "step" in found:
                found["step"] = int(found["step"])
        whole = not any(zero.is_partitioned(parameter) for _, parameter in self._everyone())
        return bool(fresh) and whole and not any(bool(parameter.grad.any()) for parameter in fresh)

    def after_step(self, groups: Sequence[Mapping[str, Any]], report: LayerReport) -> LayerReport:
        """Forgets used gradients; returns the report joined with those of the other parts of this step."""
        if not self.active:
            return report
        parameters = [parameter for group in groups for parameter in group["params"]]
        for parameter in parameters:
            zero.forget_gradients(parameter)
        self._reports[tuple(map(id, parameters))] = report
        return LayerReport.joined(list(self._reports.values()))

    def learn_names(self, optimizer: LayerwiseOptimizer) -> None:
        """Takes names from the module of the DeepSpeed engine that was given ``optimizer``, where nobody knows them.

        ``deepspeed.initialize(model=model, optimizer=Lamb(model.parameters()))`` is what Hugging Face's Trainer does.
        Looks at every object of the process, once. No communication.
        """
        kind = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
        if kind is None or self._asked_engine:
            return
        self._asked_engine = True
        named = all(members.group.get("param_names") for members in self._members)
        if named or all(annotation(parameter) is not None for _, parameter in self._everyone()):
            return
        for found in gc.get_objects():
            if issubclass(type(found), kind) and vars(found).get("basic_optimizer") is optimizer:
                annotate(found.module)
                return

    def adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Tells the ZeRO locator which parameters stood where ``groups`` now hold others."""
        self.active = self.active or self._swapped(groups)
        if not self.active:
            return
        everyone = self._everyone()
        for group in groups:
            index = self._index(group)
            named = self._members[index].named(index)
            copied = [pair for pair in named if pair[1].requires_grad]
            for position, parameter in enumerate(group["params"]):
                if self._is_original(parameter):
                    continue
                one_to_one = len(copied) == len(group["params"]) and parameter.shape == copied[position][1].shape
                if one_to_one and not zero.is_partitioned(copied[position][1]):
                    zero.adopt(parameter, [copied[position]], everyone)
                else:
                    zero.adopt(parameter, named, everyone)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def marked(self, optimizer: LayerwiseOptimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Prepares a state dict for what DeepSpeed's universal checkpoints do to it.

        Every group gets the options of all groups (see `heal`), and LARS a second moment that takes no memory, because
        the converter asks for one.
        """
        groups = saved["param_groups"]
        if not (self.active or self._swapped(optimizer.param_groups)) or len(groups) != len(self._members):
            return saved
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        for index, group in enumerate(groups):
            group[GROUPS_KEY] = [index, options]
        if optimizer.base != "adam":
            for key, found in saved["state"].items():
                if isinstance(found, dict) and "exp_avg" in found:
                    nothing = found["exp_avg"].new_zeros(()).cpu().expand_as(found["exp_avg"])
                    saved["state"][key] = {**found, "exp_avg_sq": nothing}
        return saved

    def heal(self, groups: Sequence[dict[str, Any]]) -> None:
        """Gives groups their own options back where a loader gave all of them those of the first.

        The universal loader of ZeRO 3 does. A learning rate that was changed since keeps its factor.

        Raises:
            StateDictError: the checkpoint has another number of groups.
        """
        for group in groups:
            if GROUPS_KEY not in group:
                continue
            source, options = group.pop(GROUPS_KEY)
            if len(options) != len(self._members):
                raise StateDictError(
                    f"The checkpoint has {len(options)} parameter groups, this optimizer {len(self._members)}. Build "
                    "it from the same model and the same group rules."
                )
            own = self._index(group)
            if own == source:
                continue
            factor = float(group["lr"]) / options[source]["lr"] if options[source]["lr"] else 1.0
            group.update(options[own])
            group["lr"] = group["lr"] * factor

    @contextlib.contextmanager
    def explaining(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Adds to a refused state dict what it means under ZeRO."""
        try:
            yield
        except StateDictError as error:
            if not (self.active or self._swapped(groups)):
                raise
            raise StateDictError(
                f"{error} Under ZeRO this also happens when the checkpoint was saved by another number of ranks: "
                "convert it with lightning_lamb.deepspeed.to_universal(saved, converted) and load that with "
                '"checkpoint": {"load_universal": true} in the DeepSpeed config.'
            ) from error

    # ---------------------------------------------------------------------------------------------------------- parts

    def _swapped(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        if "deepspeed" not in sys.modules:
            return False
        # DeepSpeed's are plain tensors; parameters that FSDP2 or XLA put there instead are nn.Parameters.
        first = [group["params"][0] for group in groups if len(group["params"])]
        return any(type(parameter) is Tensor and not self._is_original(parameter) for parameter in first)

    def _is_original(self, parameter: Tensor) -> bool:
        reference = self._originals.get(id(parameter))
        return reference is not None and reference() is parameter

    def _everyone(self) -> list[tuple[str, Tensor]]:
        return [pair for index, members in enumerate(self._members) for pair in members.named(index)]

    def _index(self, group: dict[str, Any]) -> int:
        return next(index for index, members in enumerate(self._members) if members.group is group)


def refuse_unsupported_options(options: Mapping[str, Any]) -> None:
    """Raises for options that cannot hold once DeepSpeed has put tensors of its own into the optimizer.

    Args:
        options: of the optimizer, or of one of its parameter groups.

    Raises:
        ConflictError: clipping by norm, which DeepSpeed does itself.
        InvalidOptionError: an option that its partitions or its checkpoints cannot hold.
    """
    limit = options.get("max_grad_norm")
    if limit is not None:
        raise ConflictError(
            f"max_grad_norm={limit} under DeepSpeed: it steps the optimizer group by group, so no step sees all "
            "gradients, and it clips itself. Leave max_grad_norm out and write "
            f'"gradient_clipping": {limit} into the DeepSpeed config (under Lightning: '
            f"Trainer(gradient_clip_val={limit})), which is as exact."
        )
    if options.get("capturable"):
        raise InvalidOptionError(
            "capturable=True under DeepSpeed: its checkpoints hold the step count as a number, so a CUDA graph cannot "
            "own it. Leave capturable unset."
        )
    if options.get("state_dtype") is not None:
        raise InvalidOptionError(
            f"state_dtype={options['state_dtype']!r} under DeepSpeed: it partitions, saves and converts the moments as "
            "float32. Leave state_dtype unset; ZeRO divides the memory over ranks, and offload_optimizer moves it."
        )
    if options.get("differentiable"):
        raise InvalidOptionError(
            "differentiable=True under DeepSpeed: its partitions are tensors without a graph. Leave differentiable "
            "unset."
        )
