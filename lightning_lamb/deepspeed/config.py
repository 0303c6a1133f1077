"""DeepSpeed configs: whose "Lamb" is meant, and what contradicts what."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lamb.errors import BatchSizeError, ConflictError, InvalidOptionError

OURS = "LightningLamb"


def load_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSpeed config as a dictionary of its own.

    Args:
        config: a dictionary, or the path of a JSON file.

    Raises:
        InvalidOptionError: no such file, or no JSON.
    """
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    try:
        loaded = json.loads(Path(config).read_text())
    except FileNotFoundError as error:
        raise InvalidOptionError(f"config={str(config)!r}: there is no such file.") from error
    except json.JSONDecodeError as error:
        raise InvalidOptionError(f"config={str(config)!r} is not JSON: {error}.") from error
    if not isinstance(loaded, dict):
        raise InvalidOptionError(f"config={str(config)!r} holds a {type(loaded).__name__}, not a DeepSpeed config.")
    return loaded


def lamb_is_ours(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a DeepSpeed config in which ``"type": "Lamb"`` means this package's `Lamb`.

        deepspeed.initialize(model=model, config=lamb_is_ours("ds_config.json"), ...)

    Without it the name means DeepSpeed's own FusedLamb, which needs CUDA and, under ZeRO, computes one ratio per
    partition instead of one per layer.

    Args:
        config: a dictionary, or the path of a JSON file; unchanged.

    Raises:
        InvalidOptionError: no such file, or no JSON.
        ConflictError: the optimizer and DeepSpeed would both clip.

    >>> lamb_is_ours({"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}})
    {'optimizer': {'type': 'LightningLamb', 'params': {'lr': 0.001}}}
    """
    ours = load_config(config)
    if means_fused_lamb(ours):
        ours["optimizer"]["type"] = OURS
    refuse_double_clipping(ours)
    return ours


def means_fused_lamb(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed would take the config's optimizer for its FusedLamb."""
    return str((config.get("optimizer") or {}).get("type", "")).lower() == "lamb"


def refuse_fused_lamb(config: Mapping[str, Any]) -> None:
    """Raises where "Lamb" would silently be DeepSpeed's.

    Raises:
        ConflictError: always there.
    """
    if means_fused_lamb(config):
        raise ConflictError(
            'the DeepSpeed config says "optimizer": {"type": "Lamb"}, which is DeepSpeed\'s own FusedLamb (CUDA only, '
            f'and wrong under ZeRO). Write "type": "{OURS}", or say that you mean this package\'s: '
            "LambDeepSpeedStrategy(lamb_is_ours=True), or lightning_lamb.deepspeed.lamb_is_ours(config)."
        )


def refuse_double_clipping(config: Mapping[str, Any], max_grad_norm: float | None = None) -> None:
    """Raises where DeepSpeed and the optimizer would both clip the gradient's norm.

    Args:
        config: of DeepSpeed.
        max_grad_norm: of an optimizer that exists already; None looks into the config's.

    Raises:
        ConflictError: both are set.
    """
    inside = ((config.get("optimizer") or {}).get("params") or {}).get("max_grad_norm")
    own = inside if max_grad_norm is None else max_grad_norm
    clipping = config.get("gradient_clipping")
    if own is not None and clipping:
        raise ConflictError(
            f'gradients would be clipped twice: "gradient_clipping": {clipping} of DeepSpeed and max_grad_norm={own} '
            "of the optimizer. Remove max_grad_norm: DeepSpeed's covers all groups and partitions."
        )


def takes_over_parameters(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed puts tensors of its own into the optimizer: everywhere but in float32 at stage 0.

    Args:
        config: of DeepSpeed, with the precision filled in.
    """
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    return bool(stage) or any((config.get(half) or {}).get("enabled") for half in ("fp16", "bf16", "bfloat16"))


def refuse_trainers_clipping(config: Mapping[str, Any], gradient_clip_val: float | None) -> None:
    """Raises where the Trainer clips at another norm than the config, which alone would count.

    Args:
        config: of DeepSpeed, as the user wrote it.
        gradient_clip_val: the Trainer's.

    Raises:
        ConflictError: both are set, and differ.
    """
    inside = config.get("gradient_clipping")
    if inside is not None and gradient_clip_val and inside != gradient_clip_val:
        raise ConflictError(
            f'"gradient_clipping": {inside} in the DeepSpeed config and Trainer(gradient_clip_val='
            f"{gradient_clip_val}): only the config's would be used. Leave one of them out."
        )


def refuse_half_without_zero(config: Mapping[str, Any]) -> None:
    """Raises for float16 at stage 0, where DeepSpeed divides gradients by a loss scale that the loss never had.

    Raises:
        ConflictError: always there.
    """
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if (config.get("fp16") or {}).get("enabled") and stage == 0:
        raise ConflictError(
            "float16 at ZeRO stage 0: DeepSpeed 0.19 divides the gradients by its loss scale there without having "
            'multiplied the loss by it, so gradient clipping and eps act on other gradients. Use "stage": 1, or bf16.'
        )


def refuse_other_batch(config: Mapping[str, Any], global_batch_size: int, micro_batch_size: int | None) -> None:
    """Raises where the config's batch sizes contradict LargeBatch.

    Args:
        config: of DeepSpeed, as the user wrote it.
        global_batch_size: LargeBatch's.
        micro_batch_size: what LargeBatch planned with; None if it does not know yet.

    Raises:
        BatchSizeError: naming both numbers.
    """
    total, micro = config.get("train_batch_size"), config.get("train_micro_batch_size_per_gpu")
    if isinstance(total, int) and total != global_batch_size:
        raise BatchSizeError(
            f'"train_batch_size": {total} in the DeepSpeed config, but '
            f"LargeBatch(global_batch_size={global_batch_size}). Remove it from the config: "
            "LargeBatch and the strategy fill it in."
        )
    if isinstance(micro, int) and micro_batch_size is not None and micro != micro_batch_size:
        raise BatchSizeError(
            f'"train_micro_batch_size_per_gpu": {micro} in the DeepSpeed config, but LargeBatch plans with batches of '
            f"{micro_batch_size} per rank. Remove it from the config, or make the two equal."
        )
