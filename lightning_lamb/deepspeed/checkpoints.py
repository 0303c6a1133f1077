"""DeepSpeed checkpoints that continue on another number of ranks, or without DeepSpeed."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lamb.deepspeed.versions import load_deepspeed
from lightning_lamb.errors import ConflictError, StateDictError


def to_universal(saved: str | Path, converted: str | Path, tag: str | None = None) -> Path:
    """Converts a ZeRO checkpoint so that any number of ranks can load it; masters, moments and steps stay intact.

    Runs on one process, without a GPU. Load the result with ``"checkpoint": {"load_universal": true}`` in the DeepSpeed
    config, by ``engine.load_checkpoint(converted)`` or ``trainer.fit(ckpt_path=converted)``. The stage family (1 and 2,
    or 3) must stay.

    Args:
        saved: what ``engine.save_checkpoint`` or the Trainer wrote.
        converted: a new folder.
        tag: which of the checkpoints in ``saved``; None: the latest.

    Returns:
        ``converted``.

    Raises:
        StateDictError: ``saved`` is no ZeRO checkpoint, or ``converted`` exists already.
        ConflictError: it was trained with ``round_robin_gradients``, whose layout DeepSpeed records wrongly.
    """
    load_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    source, target = Path(saved), Path(converted)
    tag = _tag(source, tag)
    if target.exists() and any(target.iterdir()):
        raise StateDictError(f"{target} exists already. Name a new folder for the converted checkpoint.")
    zero = _zero_config(source / tag)
    if zero.get("round_robin_gradients") and zero.get("stage") in (1, 2):
        raise ConflictError(
            f'{source / tag} was trained with "round_robin_gradients": true. DeepSpeed records the layout of such '
            "partitions wrongly, and weights of one layer would be loaded into another. Resume on the same number of "
            "ranks without conversion, or export the weights with fp32_state_dict."
        )
    options = argparse.Namespace(
        input_folder=str(source / tag),
        output_folder=str(target / tag),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=zero.get("stage") != 3,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(options)
    (target / "latest").write_text(tag)
    return target


def fp32_state_dict(saved: str | Path, tag: str | None = None, *, strip: str = "") -> dict[str, Tensor]:
    """The full-precision weights of a ZeRO checkpoint (stages 1 to 3) as a plain state dict, frozen ones included.

    Args:
        saved: what ``engine.save_checkpoint`` or the Trainer wrote.
        tag: which of the checkpoints in it; None: the latest.
        strip: a prefix to remove from every name.

    Returns:
        Name to float32 tensor on the CPU, tied weights under all of their names.

    Raises:
        StateDictError: ``saved`` is no ZeRO checkpoint, or one of DeepSpeed's BF16_Optimizer.
    """
    load_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    source = Path(saved)
    tag = _tag(source, tag)
    _zero_config(source / tag)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = dict(get_fp32_state_dict_from_zero_checkpoint(str(source), tag))
    except ValueError as error:
        raise StateDictError(
            f"DeepSpeed cannot read the weights of {source / tag} ({error}). It exports what ZeRO 1 to 3 saved, not "
            'what its BF16_Optimizer did ("grad_accum_dtype": "fp32" at stage 1). Convert it with to_universal: '
            "each float32 weight then lies in <tag>/zero/<name>/fp32.pt of the converted folder."
        ) from error
    for file in sorted((source / tag).glob("mp_rank_*_model_states.pt")):  # ZeRO 1 leaves frozen weights only there
        module = torch.load(file, map_location="cpu", weights_only=False, mmap=True).get("module") or {}
        found |= {
            name: value.float() for name, value in module.items() if name not in found and value.is_floating_point()
        }
    return {name.removeprefix(strip): weight for name, weight in found.items()}


def refuse_other_ranks(saved: str | Path, ranks: int, tag: str | None = None) -> None:
    """Raises for a ZeRO checkpoint that another number of ranks saved, which DeepSpeed cannot load as it is.

    Args:
        saved: what ``engine.save_checkpoint`` or the Trainer wrote; anything but a ZeRO checkpoint passes.
        ranks: the number of data-parallel ranks that want to load it.
        tag: which of the checkpoints in it; None: the latest.

    Raises:
        StateDictError: it has to be converted first.
    """
    folder = Path(saved)
    tag = _latest(folder) if tag is None else tag
    partitions = len(list((folder / tag).glob("*_optim_states.pt"))) if tag else 0
    if partitions not in (0, ranks):
        raise StateDictError(
            f"{folder} was saved by {partitions} ranks and is to be loaded by {ranks}. Convert it once with "
            f"lightning_lamb.deepspeed.to_universal({str(folder)!r}, ...) and load the converted folder with "
            '"checkpoint": {"load_universal": true} in the DeepSpeed config, on any number of ranks.'
        )


def _latest(folder: Path) -> str | None:
    """The tag of the checkpoint that was saved last; None if the folder does not say."""
    file = folder / "latest"
    return file.read_text().strip() if file.is_file() else None


def _tag(folder: Path, tag: str | None) -> str:
    tag = _latest(folder) if tag is None else tag
    if tag is None or not (folder / tag).is_dir():
        raise StateDictError(
            f"{folder} is no DeepSpeed checkpoint: it has no {'file `latest`' if tag is None else f'folder {tag!r}'}. "
            "Give the folder that was handed to save_checkpoint, and tag=... if it was saved without `latest`."
        )
    return tag


def _zero_config(folder: Path) -> Mapping[str, Any]:
    """The ``zero_optimization`` section that a checkpoint was trained with, which DeepSpeed saves beside the state."""
    files = sorted(folder.glob("*_optim_states.pt"))
    if not files:
        raise StateDictError(
            f"{folder} holds no partitions (*_optim_states.pt), so it was not saved under ZeRO: its model file is a "
            "plain checkpoint, which any number of ranks can load as it is."
        )
    # DeepSpeed pickles classes of its own.
    content = torch.load(files[0], map_location="cpu", weights_only=False, mmap=True)
    config: Mapping[str, Any] = (content.get("ds_config") or {}).get("zero_optimization") or {}
    return config
