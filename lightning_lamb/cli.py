"""`LambCLI`: LightningCLI that builds the optimizer late, from named parameters, and steps schedulers per step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lamb.callbacks.conflicts import refuse_double_clipping
from lightning_lamb.callbacks.large_batch import large_batch_of
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.lightning_seams import load_cli, module_that_knows, register_strategies, total_optimizer_steps
from lightning_lamb.optimizers import Lamb, Lars, LayerwiseOptimizer, ShardedStateOptimizer
from lightning_lamb.param_groups import GroupRules, lamb_param_groups
from lightning_lamb.schedules import StagedWarmup
from lightning_lamb.sharding.annotate import annotate, clean_name, true_shape

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, ReduceLROnPlateau
else:
    _cli = load_cli()
    LightningArgumentParser, LightningCLI = _cli.LightningArgumentParser, _cli.LightningCLI
    ReduceLROnPlateau = _cli.ReduceLROnPlateau


def _lamb_deepspeed(**options: Any) -> Any:
    """Builds LambDeepSpeedStrategy; DeepSpeed is imported only when its name was asked for."""
    from lightning_lamb.deepspeed import LambDeepSpeedStrategy

    return LambDeepSpeedStrategy(**options)


register_strategies(_lamb_deepspeed)


class LambCLI(LightningCLI):
    """LightningCLI with LAMB in its place.

    * ``--optimizer Lamb`` and ``--optimizer Lars`` are this package's, whatever else is imported; every other optimizer
      works by its name or path, the presets by theirs (``--optimizer lightning_lamb.presets.timm_lamb``).
    * The optimizer is built when Lightning calls ``configure_optimizers``: after FSDP2 or tensor parallelism
      replaced the parameters, which the stock CLI misses.
    * ``--param_groups.no_decay_names '["embedding"]'`` and so on: which parameters have no decay or no trust ratio.
    * ``--shard_optimizer_state true``: under DDP, the optimizer's state divided by the number of ranks.
    * Schedulers step per optimizer step (``--lr_interval``), and a StagedWarmup without ``total_steps`` gets the
      Trainer's length.
    * ``--trainer.strategy lamb_deepspeed_stage_2`` and so on: LambDeepSpeedStrategy by name.

    Takes the arguments of LightningCLI.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds ``--optimizer``, ``--lr_scheduler``, ``--lr_interval`` and ``--param_groups``.

        A subclass that overrides it calls this one too.
        """
        # Names are looked up among the first class's descendants first: `Lamb` is ours, also when timm is imported.
        parser.add_optimizer_args((Lamb, Lars, Optimizer))
        parser.add_lr_scheduler_args((StagedWarmup, LRScheduler, ReduceLROnPlateau))
        parser.add_argument(
            "--lr_interval",
            type=Literal["step", "epoch"],
            default="step",
            help="When the scheduler of --lr_scheduler steps: after every optimizer step, or every epoch.",
        )
        parser.add_class_arguments(GroupRules, "param_groups")
        parser.add_argument(
            "--shard_optimizer_state",
            type=bool,
            default=False,
            help="Under DDP, divide the state of a Lamb or Lars by the number of ranks (ZeRO stage 1).",
        )
        # Instead of the tuples of classes, which jsonargparse prints as they are.
        groups = parser.groups or {}
        groups["optimizer"].title = "The optimizer: Lamb, Lars, or any of torch.optim.Optimizer"
        groups["lr_scheduler"].title = "Its learning rate: StagedWarmup, or any of torch's LRScheduler"

    def before_instantiate_classes(self) -> None:
        """Keeps LightningCLI from building the optimizer, which it does before the Trainer exists."""
        self._builds_optimizer = self.auto_configure_optimizers
        self.auto_configure_optimizers = False

    def after_instantiate_classes(self) -> None:
        """Has ``configure_optimizers`` of the module build what ``--optimizer`` asks for, if it is given."""
        if self._builds_optimizer and self._get(self.config_init, "optimizer"):
            build: Callable[[Any], Any] = self.build_optimizers
            # A method, because Lightning asks whether the module overrides it.
            self.model.configure_optimizers = MethodType(_calling(build), self.model)  # type: ignore[method-assign]

    def build_optimizers(self, module: Any) -> Any:
        """What ``configure_optimizers`` of the module returns. Override it to change how they are built.

        Args:
            module: the LightningModule, wrapped and sharded.

        Raises:
            ConflictError: gradients would be clipped by the Trainer and by the optimizer.
        """
        trainer = module.trainer
        annotate(module_that_knows(trainer, module))
        optimizer = self._build_optimizer(module, self._get(self.config_init, "optimizer"))
        refuse_double_clipping(trainer, [optimizer])
        if not self._get(self.config_init, "lr_scheduler"):
            return optimizer
        scheduler = self._build_scheduler(trainer, optimizer, self._get(self.config_init, "lr_scheduler"))
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        interval = self._get(self.config_init, "lr_interval")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval, "name": "lr"}}

    def _build_optimizer(self, module: Any, init: Any) -> Optimizer:
        """The optimizer of ``--optimizer``: ours from named parameters or groups, others from what they know."""
        options = dict(init.get("init_args") or {})
        target = _imported(init["class_path"])
        rules: GroupRules = self._get(self.config_init, "param_groups")
        trained = [(clean_name(name), p) for name, p in module.named_parameters() if p.requires_grad]
        ours = _builds_ours(target)
        params: list[Any] = trained if ours else [parameter for _, parameter in trained]
        if rules != GroupRules():
            params = lamb_param_groups(
                module,
                weight_decay=options.get("weight_decay", 0.01),
                rules=rules,
                shape_of=true_shape,
                clean=clean_name,
            )
            if not ours:
                params = _by_decay(params)
        if self._get(self.config_init, "shard_optimizer_state"):
            if not ours:
                raise InvalidOptionError(
                    "--shard_optimizer_state divides the state of Lamb or Lars, and --optimizer is "
                    f"{init['class_path']}: leave it out, or use torch's ZeroRedundancyOptimizer in "
                    "configure_optimizers."
                )
            return ShardedStateOptimizer(params, target, **options)
        optimizer: Optimizer = target(params, **options)
        return optimizer

    def _build_scheduler(self, trainer: Any, optimizer: Optimizer, init: Any) -> Any:
        """The scheduler of ``--lr_scheduler``, its length filled in where it was left out."""
        options = dict(init.get("init_args") or {})
        target = _imported(init["class_path"])
        waits = "total_steps" in options and options["total_steps"] is None
        if isinstance(target, type) and issubclass(target, StagedWarmup):
            scheduler = target(optimizer, **options)
            scheduler.follow_optimizer()
            if scheduler.total_steps is None and large_batch_of(trainer) is None:  # LargeBatch does it itself
                scheduler.set_total_steps(total_optimizer_steps(trainer))
            return scheduler
        if waits and options.get("epochs") is None:  # OneCycleLR
            options["total_steps"] = total_optimizer_steps(trainer)
        return target(optimizer, **options)


def _by_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups for optimizers without layer-wise normalisation, which may know neither ``adapt`` nor names."""
    by_decay: dict[float, list[Any]] = {}
    for group in groups:
        by_decay.setdefault(group["weight_decay"], []).extend(parameter for _, parameter in group["params"])
    return [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()]


def _calling(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``build`` as a plain function, which can become a method of another object."""

    def configure_optimizers(module: Any) -> Any:
        return build(module)

    return configure_optimizers


def _imported(class_path: str) -> Any:
    """The class or function of a ``class_path``."""
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def _builds_ours(target: Any) -> bool:
    """Whether a class, or a function by its return annotation, gives a Lamb or Lars."""
    kind = target if isinstance(target, type) else get_type_hints(target).get("return")
    return isinstance(kind, type) and issubclass(kind, LayerwiseOptimizer)
