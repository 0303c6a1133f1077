"""`LambDeepSpeedStrategy`: Lightning's DeepSpeed strategy with exact accumulation, on CUDA and on the CPU.

Overrides some methods of `DeepSpeedStrategy` whose names begin with an underscore; ``tests/deepspeed/test_strategy.py``
fails where Lightning changes one.
"""

# ruff: noqa: SLF001 - a subclass of what it reaches into

from __future__ import annotations

import argparse
import importlib
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_lamb.callbacks.large_batch import large_batch_of
from lightning_lamb.callbacks.schedule import fill_total_steps
from lightning_lamb.deepspeed import config as configs
from lightning_lamb.deepspeed.accumulation import scaled_gradients, tell_accumulation
from lightning_lamb.deepspeed.checkpoints import refuse_other_ranks
from lightning_lamb.deepspeed.json_entries import SCHEDULERS
from lightning_lamb.deepspeed.versions import load_deepspeed
from lightning_lamb.errors import ConflictError
from lightning_lamb.lightning_seams import closes_window, is_fitting, load_lightning, reset_seed
from lightning_lamb.optimizers import LayerwiseOptimizer, ShardedStateOptimizer
from lightning_lamb.optimizers.hosted import refuse_unsupported_options
from lightning_lamb.sharding.annotate import annotate

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DeepSpeedStrategy
else:
    DeepSpeedStrategy = importlib.import_module(f"{load_lightning().__name__}.strategies").DeepSpeedStrategy


class LambDeepSpeedStrategy(DeepSpeedStrategy):
    """`DeepSpeedStrategy` for LAMB at large batches.

    What it adds to Lightning's:

    * Lightning alone counts micro-batches, and the loss is divided by the accumulation once. Lightning's strategy and
      DeepSpeed both divide, which halves gradients at an accumulation of 2, and count separately. So
      ``accumulate_grad_batches`` may change between epochs, a short last window is stepped, and LargeBatch's exact
      windows work.
    * ``"optimizer": {"type": "LightningLamb"}`` (or LightningLars) and ``"scheduler": {"type": "StagedWarmup"}`` in the
      config; layers are reported by name.
    * ``accelerator="cpu"`` besides "cuda", on gloo.
    * Contradictions are refused before training: two optimizers, two clippings, other batch sizes than LargeBatch's.

    Args:
        *args: of DeepSpeedStrategy.
        lamb_is_ours: ``{"type": "Lamb"}`` in the config means this package's Lamb. False: it is refused, because
            DeepSpeed would take its own FusedLamb.
        **kwargs: of DeepSpeedStrategy: ``stage``, ``config``, ``offload_optimizer`` and so on.

    Raises:
        MissingDependencyError: DeepSpeed is not installed, or not in a version that was tested.
        ConflictError: two parts of the set-up would do the same thing.
        BatchSizeError: the config's batch contradicts LargeBatch.
        StateDictError: a checkpoint of another number of ranks, unconverted.
    """

    def __init__(self, *args: Any, lamb_is_ours: bool = False, **kwargs: Any) -> None:
        load_deepspeed()
        super().__init__(*args, **kwargs)
        assert isinstance(self.config, dict)
        self.config = configs.lamb_is_ours(self.config) if lamb_is_ours else configs.load_config(self.config)
        configs.refuse_fused_lamb(self.config)
        configs.refuse_double_clipping(self.config)
        # Offloaded state is stepped by our optimizer on the host; DeepSpeed would insist on its own Adam.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self._scaling = ExitStack()

    # ---- CUDA or CPU

    @property
    def _on_cpu(self) -> bool:
        return type(self.accelerator).__name__ == "CPUAccelerator"

    def setup_environment(self) -> None:
        """Lightning's, without its refusal of the CPU.

        Raises:
            ConflictError: the Trainer computes on the CPU and DeepSpeed elsewhere.
        """
        if not self._on_cpu:
            super().setup_environment()
            return
        from deepspeed.accelerator import get_accelerator

        name = get_accelerator()._name
        if name != "cpu":
            raise ConflictError(
                f"Trainer(accelerator='cpu'), but DeepSpeed chose {name!r} when it was imported: set the environment "
                "variable DS_ACCELERATOR=cpu before Python starts."
            )
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Lightning's, without its check of CUDA device indices on the CPU."""
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Lightning's, after the last checks; on the CPU with a rank for the device index that it does not have."""
        assert isinstance(self.config, dict)
        annotate(model)
        self._refuse_options(optimizer)
        if not self._on_cpu:
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        engine, wrapper, _, _ = load_deepspeed().initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, wrapper

    def _initialize_deepspeed_inference(self, model: Any) -> None:
        """Lightning's, for validate, test and predict; on the CPU with a rank for the device index."""
        if not self._on_cpu:
            super()._initialize_deepspeed_inference(model)
            return
        assert isinstance(self.config, dict)
        kept = ["fp16", "bf16"]
        if self.zero_stage_3:
            kept += ["zero_allow_untested_optimizer", "zero_optimization"]
        config = {name: self.config[name] for name in kept if name in self.config}
        config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed wants one
        stock = importlib.import_module(DeepSpeedStrategy.__module__)
        stock.remove_module_hooks(model)  # of the engine that trained it
        self.model, _, _, _ = load_deepspeed().initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=config,
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    # ---- what the config and the module say

    def _format_config(self) -> None:
        """Lightning's, after comparing batch sizes with LargeBatch."""
        assert isinstance(self.config, dict)
        module = self.lightning_module
        if module is not None:
            configs.refuse_trainers_clipping(self.config, module.trainer.gradient_clip_val)
        large_batch = None if module is None else large_batch_of(module.trainer)
        if large_batch is not None:
            derived = large_batch.derived
            micro = None if derived is None else derived.micro_batch_size
            configs.refuse_other_batch(self.config, large_batch.rules.global_batch_size, micro)
            if micro is not None:
                self.config.setdefault("train_micro_batch_size_per_gpu", micro)
        super()._format_config()
        configs.refuse_half_without_zero(self.config)

    def _initialize_deepspeed_train(self, model: Any) -> None:
        """Lightning's, with one optimizer and one schedule, and the schedule's length filled in."""
        assert isinstance(self.config, dict)
        if "optimizer" in self.config:
            self._refuse_two_optimizers()
        super()._initialize_deepspeed_train(model)
        module = self.lightning_module
        if module is None or large_batch_of(module.trainer) is not None:  # LargeBatch fills it in, and adds its warm-up
            return
        fill_total_steps(module.trainer)

    def _init_optimizers(self) -> tuple[Any, Any]:
        """Lightning's, refusing a second schedule."""
        assert isinstance(self.config, dict)
        optimizer, scheduler = super()._init_optimizers()
        if scheduler is not None and "scheduler" in self.config:
            raise ConflictError(
                f'the DeepSpeed config has a "scheduler" ({self.config["scheduler"].get("type")}), and '
                f"configure_optimizers returned {type(scheduler.scheduler).__name__}: DeepSpeed ignores the latter. "
                f"Remove one of them. ({', '.join(SCHEDULERS)} can be configured in either place.)"
            )
        return optimizer, scheduler

    def _refuse_two_optimizers(self) -> None:
        assert self.lightning_module is not None
        assert isinstance(self.config, dict)
        made = self.lightning_module.configure_optimizers()
        if made is not None:
            raise ConflictError(
                f'the DeepSpeed config has an "optimizer" ({self.config["optimizer"].get("type")}), and '
                f"{type(self.lightning_module).__name__}.configure_optimizers returns one too, which would be ignored. "
                "Remove the config's entry, or let configure_optimizers return None (leave LambMixin out)."
            )

    def _refuse_options(self, optimizer: Any) -> None:
        assert isinstance(self.config, dict)
        ours = isinstance(optimizer, (LayerwiseOptimizer, ShardedStateOptimizer))
        for group in getattr(optimizer, "param_groups", []):
            configs.refuse_double_clipping(self.config, group.get("max_grad_norm"))
            if ours and configs.takes_over_parameters(self.config):
                refuse_unsupported_options(group)

    # ---- checkpoints

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, after checking that this number of ranks can load it.

        Raises:
            StateDictError: another number of ranks saved it, and it was not converted.
        """
        assert isinstance(self.config, dict)
        fitting = self.lightning_module is not None and is_fitting(self.lightning_module.trainer)
        if fitting and not (self.config.get("checkpoint") or {}).get("load_universal"):
            refuse_other_ranks(checkpoint_path, self.world_size)
        return super().load_checkpoint(checkpoint_path, *args, **kwargs)

    # ---- accumulation

    @property
    def handles_gradient_accumulation(self) -> bool:
        """False: Lightning counts."""
        return False

    def block_backward_sync(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing to block: the engine is told at every micro-batch (ZeRO 2 and 3 refuse ``no_sync``)."""
        return nullcontext()

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Lightning's, with its own count of micro-batches and without DeepSpeed's second division of the loss."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            trainer = self.lightning_module.trainer
            tell_accumulation(self.deepspeed_engine, trainer.accumulate_grad_batches, closes_window(trainer))
            kwargs.setdefault("scale_wrt_gas", False)
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def multiply_gradients(self, factor: float | Tensor) -> None:
        """Multiplies the window's gradients, which lie in DeepSpeed's buffers, for the step that follows.

        Call it between the last backward of a window and its step, as in ``on_before_optimizer_step``.

        Args:
            factor: a number, or a 0-dim tensor, which is read on the host.
        """
        self._scaling.enter_context(scaled_gradients(self.deepspeed_engine, float(factor)))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Lightning's; afterwards `multiply_gradients` has no effect any more."""
        try:
            return super().optimizer_step(*args, **kwargs)
        finally:
            self._scaling.close()
