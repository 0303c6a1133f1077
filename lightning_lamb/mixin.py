"""`LambMixin`: gives a LightningModule its optimizer, its schedule and exact gradient clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_lamb.build import build_optimizer, build_schedule
from lightning_lamb.callbacks.conflicts import refuse_double_clipping, refuse_hybrid_resume
from lightning_lamb.callbacks.gradients import clip_by_norm, clip_by_value, refuse_unusable_gradients
from lightning_lamb.callbacks.large_batch import large_batch_of
from lightning_lamb.callbacks.state_names import name_optimizer_states
from lightning_lamb.callbacks.windows import report_count
from lightning_lamb.checks import options_of_call
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.lightning_clipping_seams import asked_clipping, grad_scaler, loss_scale_of
from lightning_lamb.lightning_data_seams import steps_ahead
from lightning_lamb.lightning_seams import (
    attached_trainer,
    inner_optimizer,
    is_deepspeed,
    is_fitting,
    module_that_knows,
)
from lightning_lamb.mixin_attributes import (
    checked_override,
    note_use,
    refuse_unknown,
    refuse_unread_rules,
    set_attributes,
)
from lightning_lamb.optimizers import Lamb, LayerwiseOptimizer
from lightning_lamb.param_groups import GroupRules, lamb_param_groups
from lightning_lamb.schedules import StagedWarmup
from lightning_lamb.sharding.annotate import annotate, clean_name, true_shape


class LambMixin:
    """Provides ``configure_optimizers`` and ``configure_gradient_clipping``; put it before LightningModule.

        class MyModel(LambMixin, LightningModule):
            lamb_lr = 2e-3
            lamb_options = {"weight_decay": 0.01, "max_grad_norm": 1.0}
            lamb_group_rules = GroupRules(no_decay_names=["embedding"])
            lamb_schedule = {"warmup_fraction": 0.1}

    Every attribute may be set on the class or, in ``__init__``, on the instance. The optimizer is built when Lightning
    asks for it, after the strategy wrapped or sharded the module, so it sees true names and shapes everywhere.
    Other plain attributes whose names begin with ``lamb_`` are refused, and so is a configure_optimizers of the
    module's own that uses nothing of the mixin and returns another optimizer.

    Attributes:
        lamb_lr: learning rate; with LargeBatch the one at its base_batch_size.
        lamb_options: further options of the optimizer, by their names in its signature.
        lamb_group_rules: which parameters have no weight decay or no trust ratio, by name, type and shape.
        lamb_schedule: options of a StagedWarmup, stepped per optimizer step, its length filled in from the Trainer;
            None: no schedule, except the warm-up that LargeBatch is asked for.
        lamb_optimizer: Lamb, Lars, or a preset (``presets.nvlamb``); any function or class that takes parameters.
        lamb_shard_optimizer_state: under DDP, divide the optimizer's state by the number of ranks (ZeRO stage 1, see
            `ShardedStateOptimizer`). FSDP and tensor parallelism divide it anyway.
    """

    lamb_lr: float | Tensor = 1e-3
    lamb_options: Mapping[str, Any] = MappingProxyType({})
    lamb_group_rules: GroupRules = GroupRules()
    lamb_schedule: Mapping[str, Any] | None = None
    lamb_optimizer: Callable[..., LayerwiseOptimizer] = Lamb
    lamb_shard_optimizer_state: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses a class in which LightningModule's own methods would win; watches a configure_optimizers of its own.

        Raises:
            ConflictError: LightningModule stands before LambMixin.
        """
        super().__init_subclass__(**kwargs)
        order = list(cls.__mro__)
        # By name, so that both Lightning packages are known without importing either.
        modules = [index for index, base in enumerate(order) if base.__name__ == "LightningModule"]
        if modules and modules[0] < order.index(LambMixin):
            written = ", ".join(base.__name__ for base in cls.__bases__)
            right = sorted(cls.__bases__, key=lambda base: not issubclass(base, LambMixin))
            raise ConflictError(
                f"class {cls.__name__}({written}): LightningModule comes before LambMixin, so its empty "
                f"configure_optimizers would win. Write class {cls.__name__}({', '.join(b.__name__ for b in right)})."
            )
        configure: Any = cls.configure_optimizers
        is_own = isinstance(configure, FunctionType) and configure is not LambMixin.configure_optimizers
        if is_own and not getattr(configure, "is_checked", False):
            cls.configure_optimizers = checked_override(configure, LambMixin)  # type: ignore[method-assign]

    # ---- optimizer and schedule

    def lamb_param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer. Override it to group by rules of your own.

        Called when the module is wrapped and sharded; ``lightning_lamb.sharding.true_shape`` tells shapes then.
        """
        note_use(self, "lamb_param_groups")
        given = options_of_call("lamb_options", self.lamb_options, self._make_optimizer)
        if isinstance(self.lamb_group_rules, GroupRules):  # otherwise refused below
            self.lamb_group_rules.refuse_contradiction(given.get("exempt_1d"))
        return lamb_param_groups(
            self,  # type: ignore[arg-type]
            weight_decay=given.get("weight_decay"),
            adapt=given.get("adapt"),
            rules=self.lamb_group_rules,
            shape_of=true_shape,
            clean=clean_name,
        )

    @property
    def _make_optimizer(self) -> Callable[..., Any]:
        """``lamb_optimizer``, which Python makes a method if it is a function on the class."""
        make: Any = self.lamb_optimizer
        if not callable(make):
            raise InvalidOptionError(
                f"lamb_optimizer={make!r} must be the class itself, Lamb or Lars, or a function such as presets.nvlamb."
            )
        return make.__func__ if isinstance(make, MethodType) and make.__self__ is self else make

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler stepped per optimizer step if there is one.

        Raises:
            ConflictError: gradients would be clipped by the Trainer and by the optimizer.
            InvalidOptionError: an attribute is not what it should be, or names an option that does not exist; or no
                parameter is trained.
        """
        note_use(self, "configure_optimizers")
        refuse_unknown(self, LambMixin)
        trainer = attached_trainer(self)  # type: ignore[arg-type]
        make = self._make_optimizer
        annotate(module_that_knows(trainer, self))  # type: ignore[arg-type]
        given = options_of_call("lamb_options", self.lamb_options, make)
        if "lr" in given and "lamb_lr" in set_attributes(self, LambMixin):
            raise ConflictError(
                f"lamb_lr={self.lamb_lr} and lamb_options={{'lr': {given['lr']}}} of {type(self).__name__} both set "
                "the learning rate: remove one."
            )
        options = {"lr": self.lamb_lr, **given}
        refuse_unread_rules(self, LambMixin)
        optimizer = build_optimizer(
            self.lamb_param_groups(),
            make,
            options,
            rules=self.lamb_group_rules,
            shard_state=self.lamb_shard_optimizer_state,
            owner=type(self).__name__,
        )
        if trainer is not None:
            refuse_double_clipping(trainer, [optimizer])
        if self.lamb_schedule is None:
            return optimizer
        given = options_of_call("lamb_schedule", self.lamb_schedule, StagedWarmup)
        # LargeBatch fills the length in itself, and adds its warm-up.
        fills = trainer is not None and large_batch_of(trainer) is None
        scheduler = build_schedule(optimizer, given, partial(steps_ahead, trainer) if fills else None)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Names the parameters of the optimizer's state, so that FSDP can read it; call it if you override it.

        Args:
            checkpoint: modified in place.
        """
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        trainer = attached_trainer(self)  # type: ignore[arg-type]
        if trainer is not None:
            name_optimizer_states(trainer, self, checkpoint)  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the one layout whose optimizer state torch restores wrongly; call it if you override it.

        Args:
            checkpoint: as it was saved.

        Raises:
            ConflictError: FSDP1's HYBRID_SHARD and a sharded checkpoint.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        trainer = attached_trainer(self)  # type: ignore[arg-type]
        if trainer is not None and is_fitting(trainer):
            refuse_hybrid_resume(trainer.strategy)

    # ---- clipping

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as ``Trainer(gradient_clip_val=...)`` asks: see `clip_gradients`, which an override may call too.

        Args:
            optimizer: its gradients are modified in place.
            gradient_clip_val: the bound; None: the Trainer's; 0 does not clip.
            gradient_clip_algorithm: "norm" or "value"; None: the Trainer's, else "norm".
        """
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's, with the norm over all shards of all layers where the optimizer is ours.

        Works under FSDP1 and under FSDP2 with tensor parallelism, where Lightning refuses, and with ``fused=True``
        under a GradScaler, whose scale is taken out of the gradients first. One all-reduce of one number per process
        group of shards; no host synchronisation. DeepSpeed clips by itself: nothing happens here then.

        Args:
            optimizer: its gradients are modified in place.
            gradient_clip_val: the bound; None: the Trainer's; 0 does not clip.
            gradient_clip_algorithm: "norm" or "value"; None: the Trainer's, else "norm".

        Raises:
            ConflictError: the Trainer says something else.
            InvalidOptionError: no number, or no such algorithm.
            UnsupportedGradientError: a sparse gradient.
        """
        trainer, own = attached_trainer(self), inner_optimizer(optimizer)  # type: ignore[arg-type]
        elsewhere = trainer is None and getattr(self, "_fabric", None) is not None
        if elsewhere or not hasattr(own, "global_grad_norm") or (trainer is not None and is_deepspeed(trainer)):
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)  # type: ignore[misc]
            return
        limit, algorithm = asked_clipping(trainer, gradient_clip_val, gradient_clip_algorithm)
        if not limit > 0:
            return
        refuse_unusable_gradients(own)
        bound: float | Tensor = limit
        scaler: Any = None if trainer is None else grad_scaler(trainer)
        scale = None if scaler is None else loss_scale_of(scaler, own)
        if scale is not None and self.automatic_optimization:  # type: ignore[attr-defined]
            scaler.unscale_(own)
        elif scale is not None:  # more micro-batches may follow, whose gradients are scaled
            bound = scale * limit
        if algorithm == "value":
            clip_by_value(own, bound, keeps_overflow=scaler is not None)
        else:
            clip_by_norm(own, bound)

    # ---- accumulation

    def report_count(self, count: float | Tensor) -> None:
        """Tells LargeBatch what this loss is averaged over; see `lightning_lamb.callbacks.report_count`."""
        report_count(self, count)  # type: ignore[arg-type]
