"""What every DeepSpeed test needs: a model of awkward layers, prescribed gradients, engines, and clean processes.

The loss of `Layers` is the sum of its weights times prescribed gradients, which are the same whatever the weights are
and whichever rank asks: the optimizer alone decides where the weights go. Gradients are representable in bfloat16 and
float16, so that all precisions get the same ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import rank, run_ranks, world_size
from reference import ReferenceLamb, ReferenceLars
from torch import Tensor, nn

STEPS = 20
LR = 1e-2
SHAPES = {
    "emb": (37, 20),  # used twice in the model, and cut by partitions
    "tiny": (3,),
    "one": (1,),
    "bias": (20,),
    "fc": (51, 20),
    "zero": (20, 20),  # starts at zero, so its first ratio is 1
    "odd": (7, 3, 5),
    "neg": (13, 11),
    "big": (64, 48),
    "last": (5,),
}


def prescribed(name: str, step: int) -> Tensor:
    """The gradient of a layer at a step."""
    draw = torch.Generator().manual_seed(7919 * step + sum(map(ord, name)))
    values = (torch.randn(SHAPES[name], generator=draw) * 0.1).bfloat16().float()
    return torch.where(values.abs() < 2**-10, 0.0, values)


class Layer(nn.Module):
    """One weight, used in a forward of its own: ZeRO 3 gathers it there."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        start = torch.randn(SHAPES[name]).bfloat16().float() * (1.0 if len(SHAPES[name]) > 1 else 0.5)
        self.w = nn.Parameter(torch.zeros(SHAPES[name]) if name == "zero" else start)

    def forward(self, step: int, share: float = 1.0) -> Tensor:
        return (self.w * (prescribed(self.name, step) * share).to(self.w.dtype)).sum()


class Layers(nn.Module):
    """All of `SHAPES`, one of them tied, and a frozen parameter.

    Args:
        without: layers that ``forward`` leaves out at odd steps.
        frozen: whether there is a frozen parameter.
    """

    def __init__(self, without: Sequence[str] = (), frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: Layer(name) for name in SHAPES})
        self.tied = self.layers["emb"]
        if frozen:
            self.frozen = nn.Parameter(torch.randn(9, 4), requires_grad=False)
        self.without = list(without)

    def forward(self, step: int) -> Tensor:
        total = self.tied(step, 0.5)
        if hasattr(self, "frozen"):
            total = total + self.frozen.sum().detach() * 0
        for name, layer in self.layers.items():
            if step % 2 and name in self.without:
                continue
            total = total + layer(step, 0.5 if name == "emb" else 1.0)
        return total


def start_weights() -> dict[str, np.ndarray]:
    """Layer name to weight before the first step."""
    return {name: layer.w.detach().double().numpy() for name, layer in Layers().layers.items()}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters under the names of `SHAPES`."""
    return [(short(name), p) for name, p in model.named_parameters() if p.requires_grad]


def short(name: str) -> str:
    """``layers.emb.w`` to ``emb``."""
    return name.split(".")[-2] if name.endswith(".w") else name


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decayed and adapted, the rest neither, as users write it by hand."""
    parameters = named(model)
    shape_of = {id(p): getattr(p, "ds_shape", p.shape) for _, p in parameters}
    return [
        {"params": [(n, p) for n, p in parameters if len(shape_of[id(p)]) > 1], "weight_decay": 0.01},
        {"params": [(n, p) for n, p in parameters if len(shape_of[id(p)]) < 2], "weight_decay": 0.0, "adapt": False},
    ]


def three_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As `two_groups`, and an adapted group of 3 elements, of which most ranks hold nothing but padding."""
    matrices, rest = two_groups(model)
    tiny = [pair for pair in rest["params"] if pair[0] == "tiny"]
    rest["params"] = [pair for pair in rest["params"] if pair[0] != "tiny"]
    return [
        {"params": tiny, "weight_decay": 0.02, "exempt_1d": False},
        {**matrices, "lr": 0.5 * LR},
        rest,
    ]


GROUPS: dict[str, Callable[[nn.Module], Any]] = {"one": named, "two": two_groups, "three": three_groups}
PER_LAYER = {  # the same groups, as the reference wants them
    "one": {},
    "two": {},
    "three": {
        "tiny": {"weight_decay": 0.02, "exempt_1d": False},
        **{name: {"lr": 0.5 * LR} for name, shape in SHAPES.items() if len(shape) > 1},
    },
}


def ds_config(stage: int, dtype: str = "fp32", clip: float = 0.0, zero: Any = None, **more: Any) -> dict[str, Any]:
    """A DeepSpeed config with small buckets (the defaults take 800 MB a rank)."""
    buckets = {"reduce_bucket_size": 10000, "allgather_bucket_size": 10000}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **buckets, **(zero or {})},
        **more,
    }
    if dtype in ("bf16", "fp16"):
        config[dtype] = {"enabled": True}
    if dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 5, "hysteresis": 1}
    return config


def full_precision(engine: Any) -> dict[str, np.ndarray]:
    """Layer name to full-precision weight, whole, on every rank.

    Not by ``safe_get_full_fp32_param``, which is wrong under ``round_robin_gradients``; stages 1 and 2 in half
    precision are read from the partitions themselves.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    wrapper, found = engine.optimizer, {}
    pairs = [(short(name), p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):  # whole copies of stage 0
        copies = {id(p): c for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups) for p, c in zip(low, high)}
        return {name: copies[id(p)].detach().double().numpy() for name, p in pairs}
    flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or getattr(
        wrapper, "fp32_groups_flat_partition", None
    )
    if flats:
        low = getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
        group_of = {id(p): index for index, group in enumerate(low) for p in group}
        whole = [_gathered(flat, wrapper.real_dp_process_group[i]) for i, flat in enumerate(flats)]
        for name, p in pairs:
            start = p.storage_offset()
            part = whole[group_of[id(p)]][start : start + p.numel()]
            found[name] = part.reshape(p.shape).double().numpy()
        return found
    for name, p in pairs:
        value = safe_get_full_fp32_param(p)  # None at stage 0 in float32
        found[name] = (p.detach() if value is None else value).detach().double().cpu().numpy().copy()
    return found


def _gathered(flat: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, flat.detach().contiguous(), group=group)
    return torch.cat(parts)


class DeepSpeedClips:
    """A reference with DeepSpeed's clip coefficient, 1 / max(1, (||g|| + 1e-6) / clip)."""

    def _clipped(self, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.max_grad_norm is None:
            return super()._clipped(grads)
        norm = float(np.sqrt(sum((grad * grad).sum() for grad in grads.values())))
        return {name: grad / max(1.0, (norm + 1e-6) / self.max_grad_norm) for name, grad in grads.items()}


class DeepSpeedClippedLamb(DeepSpeedClips, ReferenceLamb):
    """LAMB under DeepSpeed."""


class DeepSpeedClippedLars(DeepSpeedClips, ReferenceLars):
    """LARS under DeepSpeed."""


def reference_weights(
    groups: str = "two",
    clip: float = 0.0,
    steps: int = STEPS,
    kind: str = "Lamb",
    without: Sequence[str] = (),
    per_layer: Any = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Layer name to float64 weight after ``steps`` of the reference on the whole model.

    DeepSpeed gives layers that are unused in a step (``without``, at odd steps) a gradient of zero.
    """
    reference = {"Lamb": DeepSpeedClippedLamb, "Lars": DeepSpeedClippedLars}[kind](
        start_weights(), lr=LR, max_grad_norm=clip or None, per_layer=per_layer or PER_LAYER[groups], **options
    )
    for step in range(steps):
        grads = {name: prescribed(name, step).double().numpy() for name in SHAPES}
        reference.step({name: g * (0.0 if step % 2 and name in without else 1.0) for name, g in grads.items()})
    return reference.weights


def largest_error(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest absolute difference of any weight; NaN counts as infinite."""
    assert set(got) == set(expected)
    worst = max(float(np.abs(got[name] - expected[name]).max()) for name in expected)
    return worst if np.isfinite(worst) else float("inf")


def on_ranks(worker: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """`run_ranks` with DeepSpeed's environment, and without its leftovers.

    DeepSpeed forms the process group itself. What it may compile goes into a folder of the tests' own: in a shared one,
    a killed build leaves a lock that all later processes wait for. LOCAL_SIZE, which its launcher sets, would make it
    leave 69 MB per rank in shared memory.
    """
    extensions = str(Path(tempfile.gettempdir()) / f"lightning_lamb_extensions_{os.getpid()}")
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": extensions}
    assert "LOCAL_SIZE" not in os.environ, "unset LOCAL_SIZE: DeepSpeed would leave 69 MB per rank in /dev/shm"
    before = set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))
    try:
        return run_ranks(
            _on_plain_gloo, ranks, worker, *arguments, timeout=timeout, init_group=False, environment=environment
        )
    finally:
        for leftover in set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")) - before:
            leftover.unlink(missing_ok=True)
        shutil.rmtree(extensions, ignore_errors=True)


def _on_plain_gloo(worker: Callable[..., Any], *arguments: Any) -> Any:
    """Calls ``worker`` without the shared-memory collectives that DeepSpeed would compile first, for a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return worker(*arguments)


def made_engine(model: nn.Module, config: dict[str, Any], **arguments: Any) -> Any:
    """``deepspeed.initialize`` without its chatter."""
    import logging

    import deepspeed

    deepspeed.utils.logging.logger.setLevel(logging.ERROR)
    return deepspeed.initialize(model=model, config=config, **arguments)[0]


def train(engine: Any, steps: Sequence[int] = range(STEPS)) -> None:
    """One optimizer step on the prescribed gradients per entry of ``steps``."""
    for step in steps:
        engine.backward(engine(step))
        engine.step()


@contextlib.contextmanager
def counted_collectives(record: list[str]) -> Iterator[None]:
    """Notes every torch.distributed collective that is called through its module."""
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor", "barrier")
    kept = {name: getattr(torch.distributed, name) for name in names}

    def noting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            record.append(name)
            return kept[name](*arguments, **options)

        return call

    for name in names:
        setattr(torch.distributed, name, noting(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(torch.distributed, name, function)


__all__ = ["GROUPS", "LR", "PER_LAYER", "SHAPES", "STEPS", "Layers", "rank", "world_size"]
