"""Per-parameter state: allocation, full-precision masters, and loading without rounding or half-loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.errors import ConflictError, StateDictError
from lightning_lamb.optimizers.names import ordered_by_name

HALF_DTYPES = (torch.bfloat16, torch.float16)
FULL_PRECISION_KEYS = ("exp_avg", "exp_avg_sq", "master_weight")


def has_master(parameter: Tensor) -> bool:
    """Whether the parameter is too coarse to accumulate updates and needs a float32 master.

    LAMB changes a layer by the fraction ``lr`` per step; for lr <= 2e-3 that is below half the spacing of bfloat16, and
    most elements would never move.
    """
    return parameter.dtype in HALF_DTYPES


def is_narrow(state: Mapping[str, Any]) -> bool:
    """Whether the moments are stored in bfloat16, and so rounded stochastically."""
    return state["exp_avg"].dtype == torch.bfloat16


def moment_dtype(parameter: Tensor, state_dtype: str | None) -> torch.dtype:
    """The dtype of the parameter's moments: float32 at least, unless the option ``state_dtype`` asks for less."""
    if state_dtype == "bfloat16" and parameter.dtype != torch.float64:
        return torch.bfloat16
    return torch.float32 if has_master(parameter) else parameter.dtype


def prepare(state: dict[str, Any], parameter: Tensor, group: Mapping[str, Any], second_moment: bool, name: str) -> None:
    """Makes the state what the parameter needs now: the one place that allocates state, and that casts it.

    A new parameter gets ``step``, ``exp_avg``, ``exp_avg_sq`` and, for half precision, ``master_weight``. Where
    somebody cast or moved the parameter since (``module.double()``, ``module.to(device)``), moments follow its dtype
    and device, and a master is made or dropped.

    Args:
        state: modified in place.
        parameter: the tensors are laid out like it (DTensor for DTensor), in float32 if it is half precision.
        group: its parameter group, with ``capturable`` (keep ``step`` on the parameter's device, else on the host) and
            ``state_dtype``.
        second_moment: whether the optimizer has one.
        name: of the parameter, for messages.

    Raises:
        ConflictError: a state of another shape than the parameter has by now.
    """
    dtype = moment_dtype(parameter, group["state_dtype"])
    keys = ("exp_avg", "exp_avg_sq") if second_moment else ("exp_avg",)
    for key in keys:
        if key in state:
            state[key] = _like(state[key], parameter, dtype, f"{name}: its {key}")
        else:
            state[key] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    on_device = bool(group["capturable"])
    if "step" not in state:
        state["step"] = (
            torch.zeros((), dtype=torch.float32, device=parameter.device)
            if on_device
            else torch.tensor(0.0, dtype=torch.float32, device="cpu")
        )
    elif on_device and isinstance(state["step"], Tensor) and state["step"].device != parameter.device:
        state["step"] = state["step"].to(parameter.device)
    if not has_master(parameter):
        state.pop("master_weight", None)  # a model that is in full precision by now
    elif "master_weight" in state:
        state["master_weight"] = _like(state["master_weight"], parameter, torch.float32, f"{name}: its master_weight")
    else:
        state["master_weight"] = parameter.detach().to(torch.float32, memory_format=torch.preserve_format)


def _like(tensor: Tensor, parameter: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """The tensor itself, or in another dtype, on another device, without lazy bits."""
    if tensor.shape != parameter.shape:
        raise ConflictError(
            f"{what} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)} by now: state cannot "
            "follow another shape. Remove it (optimizer.state.pop(parameter)) to begin anew, or resize it yourself."
        )
    return tensor.to(device=parameter.device, dtype=dtype).resolve_neg()


def check_state_dict(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    signature: frozenset[str],
    required: Sequence[str],
    owner: str,
) -> dict[str, Any]:
    """The state dict in the order of this optimizer's parameters (see `names`); refuses one that is not of its kind.

    Args:
        state_dict: as `torch.optim.Optimizer.state_dict` makes it.
        groups: the optimizer's own parameter groups.
        signature: option names that tell this optimizer from others.
        required: keys that the state of a stepped parameter has.
        owner: its class name.

    Returns:
        A copy that shares its tensors.

    Raises:
        StateDictError: other class, other groups, other names, other shapes.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise StateDictError(f"This is no optimizer state dict: it has the keys {sorted(map(str, state_dict))}.")
    state_dict = ordered_by_name(state_dict, groups, owner)
    saved_groups = state_dict["param_groups"]
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        raise StateDictError(
            f"The state dict has parameter groups of {[len(group['params']) for group in saved_groups]} parameters, "
            f"this {owner} of {[len(group['params']) for group in groups]}. Build it from the same model and the "
            "same group rules. Nothing was loaded."
        )
    for index, group in enumerate(saved_groups):
        missing = sorted(signature - set(group))
        if missing:
            raise StateDictError(
                f"The state dict is not one of {owner}: its parameter group {index} has no {', '.join(missing)} (it "
                f"has {', '.join(sorted(set(group) - {'params'}))}). Start {owner} with fresh state, or build the "
                "optimizer that saved it. Nothing was loaded."
            )
    for saved, group in zip(saved_groups, groups):
        names = group.get("param_names") or saved.get("param_names") or [None] * len(group["params"])
        for key, parameter, name in zip(saved["params"], group["params"], names):
            _check_tensors(
                state_dict["state"].get(key, {}), parameter, str(name or f"parameter {key}"), owner, required
            )
    return state_dict


def restore_full_precision(
    state: Mapping[Any, dict[str, Any]], groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> None:
    """Replaces the tensors whose dtype torch changed: full-precision ones of half-precision parameters, narrow moments.

    `torch.optim.Optimizer.load_state_dict` casts all floating state to the parameter's dtype, except ``step``.
    """
    for saved, group in zip(state_dict["param_groups"], groups):
        for key, parameter in zip(saved["params"], group["params"]):
            loaded = state.get(parameter)
            narrow = moment_dtype(parameter, group.get("state_dtype"))
            if loaded is None or (narrow == parameter.dtype and not has_master(parameter)):
                continue
            for name in FULL_PRECISION_KEYS:
                original = state_dict["state"].get(key, {}).get(name)
                if isinstance(original, Tensor):
                    dtype = torch.float32 if name == "master_weight" else narrow
                    # clone: torch keeps no tensor of the caller's dict either, unless dtype and device already agree
                    loaded[name] = original.detach().to(device=parameter.device, dtype=dtype).clone()


def restore_steps(state: Mapping[Any, dict[str, Any]]) -> None:
    """Makes steps tensors of their own: saved as plain numbers, on the host; saved as tensors, copies.

    Torch keeps the loaded tensor, and counting in place would count in the caller's state dict too.
    """
    entries: list[Any] = list(state.values())  # a hook of the user's may have left anything there
    for found in entries:
        if isinstance(found, dict) and "step" in found:
            step = found["step"]
            own = (
                step.clone()
                if isinstance(step, Tensor)
                else torch.tensor(float(step), dtype=torch.float32, device="cpu")
            )
            found["step"] = own


def _check_tensors(saved: Mapping[str, Any], parameter: Tensor, name: str, owner: str, required: Sequence[str]) -> None:
    missing = [key for key in required if saved and key not in saved]
    if missing:
        raise StateDictError(
            f"{name}: the state dict has {', '.join(map(str, saved))} but no {', '.join(missing)}, which {owner} needs "
            "to continue. Load a state dict that this class saved. Nothing was loaded."
        )
    for key, value in saved.items():
        if key != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
            raise StateDictError(
                f"{name}: the state dict's {key} has shape {tuple(value.shape)}, the parameter "
                f"{tuple(parameter.shape)}. Load the {owner} state of this model. Nothing was loaded."
            )
