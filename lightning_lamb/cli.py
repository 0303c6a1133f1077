"""`LambCLI`: LightningCLI that builds the optimizer late, from named parameters, and steps schedulers per step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lamb.build import build_optimizer, build_schedule, builds_ours, said_options
from lightning_lamb.callbacks.conflicts import refuse_double_clipping
from lightning_lamb.callbacks.large_batch import large_batch_of
from lightning_lamb.errors import ConflictError, InvalidOptionError
from lightning_lamb.lightning_data_seams import steps_ahead
from lightning_lamb.lightning_seams import load_cli, module_that_knows, rank_zero_warn, register_strategies
from lightning_lamb.mixin import LambMixin
from lightning_lamb.mixin_attributes import refuse_unknown, set_attributes
from lightning_lamb.optimizers import Lamb, Lars
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
    * Schedulers step per optimizer step (unless ``--lr_interval`` or LargeBatch(scheduler_interval=...) say "epoch"),
      and a StagedWarmup without ``total_steps`` gets the Trainer's length.
    * What shapes the optimizer of ``--optimizer`` is refused without one, instead of being ignored.
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
            type=Literal["step", "epoch"] | None,
            default=None,
            help="When the scheduler of --lr_scheduler steps: after each optimizer step (the default), or each epoch.",
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
        """Has ``configure_optimizers`` of the module build what ``--optimizer`` asks for, if it is given.

        Raises:
            InvalidOptionError: an option that has no effect, because what it belongs to is not given.
        """
        if not self._builds_optimizer:
            return
        self._refuse_ignored()
        if self._get(self.config_init, "optimizer"):
            build: Callable[[Any], Any] = self.build_optimizers
            # A method, because Lightning asks whether the module overrides it.
            self.model.configure_optimizers = MethodType(_calling(build), self.model)  # type: ignore[method-assign]

    def _refuse_ignored(self) -> None:
        """Raises for options of an optimizer or a scheduler that is not there."""
        given = {name: self._get(self.config_init, name) for name in ("optimizer", "lr_scheduler", "lr_interval")}
        parts = {
            "--lr_scheduler": given["lr_scheduler"],
            "--lr_interval": given["lr_interval"],
            "--param_groups": self._get(self.config_init, "param_groups") != GroupRules(),
            "--shard_optimizer_state": self._get(self.config_init, "shard_optimizer_state"),
        }
        lost = [name for name, value in parts.items() if value]
        if lost and not given["optimizer"]:
            raise InvalidOptionError(
                f"{' and '.join(lost)} without --optimizer: the module's own configure_optimizers is used, and would "
                "ignore it. Add --optimizer Lamb (or another), or leave it out and configure it in the module."
            )
        if given["lr_interval"] and not given["lr_scheduler"]:
            raise InvalidOptionError(
                f"--lr_interval {given['lr_interval']} without --lr_scheduler: there is nothing that steps. Add one, "
                "or leave it out."
            )

    def build_optimizers(self, module: Any) -> Any:
        """What ``configure_optimizers`` of the module returns. Override it to change how they are built.

        Args:
            module: the LightningModule, wrapped and sharded.

        Raises:
            ConflictError: gradients would be clipped by the Trainer and by the optimizer.
        """
        trainer = module.trainer
        if isinstance(module, LambMixin):
            _tell_what_is_replaced(module)
        annotate(module_that_knows(trainer, module))
        optimizer = self._build_optimizer(module, self._get(self.config_init, "optimizer"))
        refuse_double_clipping(trainer, [optimizer])
        if not self._get(self.config_init, "lr_scheduler"):
            return optimizer
        scheduler = self._build_scheduler(trainer, optimizer, self._get(self.config_init, "lr_scheduler"))
        interval = self._interval(trainer, scheduler)
        if isinstance(scheduler, ReduceLROnPlateau):
            config = {"scheduler": scheduler, "monitor": scheduler.monitor}
            asked = self._get(self.config_init, "lr_interval")  # LargeBatch leaves these as they are
            return {"optimizer": optimizer, "lr_scheduler": {**config, **({"interval": asked} if asked else {})}}
        config = {"scheduler": scheduler, "interval": interval or "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _interval(self, trainer: Any, scheduler: Any) -> str | None:
        """When the scheduler steps, as ``--lr_interval`` and LargeBatch say it; None where neither does.

        Raises:
            ConflictError: they differ.
            InvalidOptionError: "epoch" for a StagedWarmup.
        """
        asked = self._get(self.config_init, "lr_interval")
        large_batch = large_batch_of(trainer)
        other = None if large_batch is None else large_batch.scheduler_interval
        if asked and other and asked != other:
            raise ConflictError(
                f"--lr_interval {asked} and LargeBatch(scheduler_interval={other!r}) differ about when the scheduler "
                "steps: leave one of them out."
            )
        if asked == "epoch" and isinstance(scheduler, StagedWarmup):
            raise InvalidOptionError(
                "--lr_interval epoch with StagedWarmup, whose stages, warm-up and length are optimizer steps: leave "
                "--lr_interval out, or use a scheduler of torch's."
            )
        return asked or other

    def _build_optimizer(self, module: Any, init: Any) -> Optimizer:
        """The optimizer of ``--optimizer``: ours from named parameters or groups, others from what they know."""
        target = _imported(init["class_path"])
        options = said_options(target, init.get("init_args") or {})
        rules: GroupRules = self._get(self.config_init, "param_groups")
        ours = builds_ours(target)
        shards = self._get(self.config_init, "shard_optimizer_state")
        if shards and not ours:
            raise InvalidOptionError(
                f"--shard_optimizer_state divides the state of Lamb or Lars, and --optimizer is {init['class_path']}: "
                "leave it out, or use torch's ZeroRedundancyOptimizer in configure_optimizers."
            )
        params: list[Any]
        if rules != GroupRules():
            params = lamb_param_groups(module, rules=rules, shape_of=true_shape, clean=clean_name)
        else:
            trained = [(clean_name(name), p) for name, p in module.named_parameters() if p.requires_grad]
            params = list(trained) if ours else [parameter for _, parameter in trained]
        return build_optimizer(params, target, options, rules=rules, shard_state=shards, owner=type(module).__name__)

    def _build_scheduler(self, trainer: Any, optimizer: Optimizer, init: Any) -> Any:
        """The scheduler of ``--lr_scheduler``, its length filled in where it was left out."""
        options = dict(init.get("init_args") or {})
        target = _imported(init["class_path"])
        if target is StagedWarmup:
            # LargeBatch fills the length in itself.
            return build_schedule(
                optimizer, options, partial(steps_ahead, trainer) if large_batch_of(trainer) is None else None
            )
        waits = "total_steps" in options and options["total_steps"] is None
        if waits and options.get("epochs") is None:  # OneCycleLR
            options["total_steps"] = steps_ahead(trainer)
        return target(optimizer, **options)


def _tell_what_is_replaced(module: LambMixin) -> None:
    """Says which attributes of a LambMixin have no effect, because ``--optimizer`` was given."""
    refuse_unknown(module, LambMixin)
    names = sorted(set_attributes(module, LambMixin))
    if names:
        rank_zero_warn(
            f"--optimizer replaces the optimizer of LambMixin: {', '.join(names)} of {type(module).__name__} have no "
            "effect. Leave --optimizer out to train with them."
        )


def _calling(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``build`` as a plain function, which can become a method of another object."""

    def configure_optimizers(module: Any) -> Any:
        return build(module)

    return configure_optimizers


def _imported(class_path: str) -> Any:
    """The class or function of a ``class_path``."""
    module, name = class_path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
