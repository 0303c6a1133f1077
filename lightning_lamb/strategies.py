"""`CPUFSDPStrategy`: FSDP1 that also runs on a laptop, and tells the optimizer what its slices are slices of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightning_lamb.callbacks.conflicts import refuse_hybrid_resume
from lightning_lamb.errors import ConflictError, UnknownShardError
from lightning_lamb.lightning_seams import load_lightning
from lightning_lamb.sharding.annotate import annotate

if TYPE_CHECKING:
    from lightning.pytorch.strategies import FSDPStrategy
else:
    FSDPStrategy = importlib.import_module(f"{load_lightning().__name__}.strategies").FSDPStrategy


class CPUFSDPStrategy(FSDPStrategy):
    """`FSDPStrategy` on CPU and gloo as well as on GPUs.

    Lightning refuses FSDP1 on the CPU; torch does not, if it is told the device. Good for tests and for trying a
    configuration at home. It annotates the wrapped model, so Lamb works however it was built, with a stock LightningCLI
    without any callback too.

        Trainer(accelerator="cpu", devices=2, strategy=CPUFSDPStrategy(auto_wrap_policy={Block}))

    Args:
        *args: of FSDPStrategy.
        state_dict_type: "sharded" saves a folder that any number of ranks can read; "full" a file, which torch cannot
            write on the CPU.
        **kwargs: of FSDPStrategy.

    Raises:
        ConflictError: ``state_dict_type="full"`` on the CPU, where torch would crash.
        UnknownShardError: ``use_orig_params=False``.
    """

    def __init__(self, *args: Any, state_dict_type: Literal["full", "sharded"] = "sharded", **kwargs: Any) -> None:
        if kwargs.get("use_orig_params") is False:
            raise UnknownShardError(
                "CPUFSDPStrategy(use_orig_params=False): FSDP then shows one flat parameter in which layers are "
                "invisible, and their trust ratios cannot be computed. Use use_orig_params=True, the default."
            )
        kwargs["state_dict_type"] = state_dict_type
        super().__init__(*args, **kwargs)

    def setup_environment(self) -> None:
        """Forms the group; a ``device_mesh`` given as sizes becomes a mesh of this device.

        Raises:
            ConflictError: ``state_dict_type="full"`` on a CPU.
        """
        on_cpu = self.root_device.type == "cpu"
        if on_cpu and self._state_dict_type == "full":
            raise ConflictError(
                'CPUFSDPStrategy(state_dict_type="full"): on the CPU torch frees the memory that such a checkpoint is '
                'copied from and crashes. Use state_dict_type="sharded", the default.'
            )
        sizes = self.kwargs.get("device_mesh")
        if not (on_cpu and isinstance(sizes, (tuple, list))):
            super().setup_environment()
            return
        del self.kwargs["device_mesh"]  # Lightning would make one of GPUs
        super().setup_environment()
        from torch.distributed.device_mesh import init_device_mesh

        self.kwargs["device_mesh"] = init_device_mesh("cpu", tuple(sizes))

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped = any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
        if self.root_device.type == "cpu" and not wrapped:
            model = FullyShardedDataParallel(
                module=model,
                cpu_offload=self.cpu_offload,
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )
            # Used now; Lightning warns of a policy beside a wrapped model.
            self.kwargs.pop("auto_wrap_policy", None)
        model = super()._setup_model(model)
        annotate(model)
        return model

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint.

        Raises:
            ConflictError: HYBRID_SHARD, with an optimizer whose state torch would restore wrongly.
        """
        if self.optimizers:
            refuse_hybrid_resume(self)
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)
