"""The optimizers that are timed side by side, each with settings that make it do the same work.

Same work: one trust ratio per tensor, weight decay, no clipping, an LR so small that the weights stay where they are.
A contender that cannot run here says why; it is listed with that reason, never dropped.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BASELINE = "torch AdamW fused"
OURS = "lightning_lamb Lamb"
SETTINGS: dict[str, Any] = {"lr": 1e-7, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01}

# What must cross the memory bus per fp32 parameter and step, at least. Adam reads w, g, m, v and writes w, m, v. LAMB
# knows the ratio only after all of a layer, so it reads m, v, w again to apply: 12 B more, unless the
# cache still holds them.
ADAM_BYTES, LAMB_BYTES = 28, 40
# With moments in bfloat16: w, g, m, v are read (12), m and v written (4), then w, m, v read and w written (12).
NARROW_BYTES = 28


@dataclass(frozen=True)
class Contender:
    """An optimizer to time.

    Attributes:
        name: as printed.
        package: distribution whose version is printed.
        build: makes the optimizer from the parameters; raises where it cannot run, and the message is the reason.
        bytes_per_parameter: that the algorithm must move, for the bandwidth column.
        devices: where it can run.
        shares_state: whether its moments are those of the others; False: it keeps its own, in another dtype.
    """

    name: str
    package: str
    build: Callable[[list[Tensor]], Optimizer]
    bytes_per_parameter: int = LAMB_BYTES
    devices: tuple[str, ...] = ("cpu", "cuda")
    shares_state: bool = True

    def version(self) -> str | None:
        """The installed version of its package, or None."""
        if self.package == "lightning-lamb":
            return importlib.import_module("lightning_lamb").__version__  # also where it runs from a checkout
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def _ours(params: list[Tensor], **options: Any) -> Optimizer:
    from lightning_lamb import Lamb

    # Peers give 1-D tensors a ratio too.
    return Lamb(params, exempt_1d=False, **SETTINGS, **options)


def _timm(params: list[Tensor], **options: Any) -> Optimizer:
    return timm_lamb_class()(params, max_grad_norm=None, **SETTINGS, **options)


def timm_lamb_class() -> type[Optimizer]:
    """The Lamb of timm, also where ``import timm`` fails for want of torchvision: its optimizers do without."""
    try:
        return importlib.import_module("timm.optim.lamb").Lamb
    except ImportError:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
            del sys.modules[name]
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("not installed")
    # A package of our own name with timm's folder as its path: `timm/optim/__init__.py` itself is never executed.
    package = types.ModuleType("timm_optim_alone")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "optim")]
    sys.modules["timm_optim_alone"] = package
    return importlib.import_module("timm_optim_alone.lamb").Lamb


def _pytorch_optimizer(params: list[Tensor]) -> Optimizer:
    return importlib.import_module("pytorch_optimizer").Lamb(params, weight_decouple=False, **SETTINGS)


def _torch_optimizer(params: list[Tensor]) -> Optimizer:
    return importlib.import_module("torch_optimizer").Lamb(params, **SETTINGS)


def _deepspeed(params: list[Tensor]) -> Optimizer:
    return importlib.import_module("deepspeed.ops.lamb").FusedLamb(params, **SETTINGS)


def _apex(params: list[Tensor]) -> Optimizer:
    # 0 would divide by zero and None is not understood: a bound that is never reached.
    return importlib.import_module("apex.optimizers").FusedLAMB(params, use_nvlamb=True, max_grad_norm=1e30, **SETTINGS)


def _adamw(params: list[Tensor], **options: Any) -> Optimizer:
    return torch.optim.AdamW(params, **SETTINGS, **options)


CONTENDERS = (
    Contender(BASELINE, "torch", partial(_adamw, fused=True), ADAM_BYTES),
    Contender("torch AdamW foreach", "torch", partial(_adamw, foreach=True), ADAM_BYTES),
    Contender(f"{OURS} eager", "lightning-lamb", partial(_ours, foreach=False)),
    Contender(f"{OURS} foreach", "lightning-lamb", partial(_ours, foreach=True)),
    Contender(f"{OURS} fused", "lightning-lamb", partial(_ours, fused=True)),
    Contender(
        f"{OURS} fused, bf16 state",
        "lightning-lamb",
        partial(_ours, fused=True, state_dtype="bfloat16"),
        NARROW_BYTES,
        shares_state=False,
    ),
    Contender("timm Lamb", "timm", partial(_timm, foreach=False)),
    Contender("timm Lamb foreach", "timm", partial(_timm, foreach=True)),
    Contender("pytorch_optimizer Lamb", "pytorch_optimizer", _pytorch_optimizer),
    Contender("torch_optimizer Lamb", "torch-optimizer", _torch_optimizer),
    Contender("DeepSpeed FusedLamb", "deepspeed", _deepspeed, devices=("cuda",)),
    Contender("apex FusedLAMB", "apex", _apex, devices=("cuda",)),
)


def reason_not_to_run(contender: Contender, device: str) -> str | None:
    """Builds it on one small parameter and takes one step; the reason why that is not possible, or None."""
    if device not in contender.devices:
        return f"does not run on {device}"
    if contender.version() is None:
        return "not installed"
    try:
        take_one_step(contender, device)
    except Exception as error:  # noqa: BLE001  a peer may fail in any way, and the reason is what we print
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else type(error).__name__
    return None


def take_one_step(contender: Contender, device: str) -> None:
    """One step on one 4x4 parameter."""
    param = torch.nn.Parameter(torch.ones(4, 4, device=device))
    param.grad = torch.ones_like(param)
    contender.build([param]).step()
