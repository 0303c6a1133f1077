"""Runs the training of one cell, as a user would write it, and brings back what happened."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from lightning_lamb import Lamb, LambCLI, LambMixin, LargeBatch
from lightning_lamb.errors import LightningLambError
from tests.lightning.composition.cell import EPOCHS, GLOBAL_BATCH, MICRO_BATCH, RATE, SCALE, Cell
from tests.lightning.composition.loader_features import SHUFFLED, loader
from tests.lightning.composition.observed import Observed, Samples, Window
from tests.lightning.toys import quiet_trainer


@dataclasses.dataclass
class Happened:
    """What one rank saw."""

    error: str = ""
    by: str = ""
    windows: list[Window] = dataclasses.field(default_factory=list)
    left_over: list[list[int]] = dataclasses.field(default_factory=list)
    told: int | None = None
    global_step: int = 0
    suggestion: float | None = None
    announced: dict[str, Any] = dataclasses.field(default_factory=dict)


class Own(Observed):
    """Has its own ``configure_optimizers``: two groups, the second at half the rate."""

    cell: Cell
    lr = RATE

    def configure_optimizers(self) -> Any:
        made = self.cell.of("optimizer")
        groups = halved_groups(self, self.lr)
        optimizer = Lamb(groups, lr=self.lr) if made is None else made.make(groups)
        scheduler = self.cell.of("scheduler")
        if scheduler is None:
            return optimizer
        if "OneCycleLR" in scheduler.name:
            self.told = int(self.trainer.estimated_stepping_batches)
        built = scheduler.make(optimizer, 1.0, self.told)
        config = {key: value for key, value in scheduler.config.items() if key != "asked"}
        if "asked" in scheduler.config:
            config["interval"] = scheduler.config["asked"]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": built, **config}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """As Lightning asks of everybody who has a scheduler that is not torch's."""
        if isinstance(scheduler, LRScheduler):
            super().lr_scheduler_step(scheduler, metric)
        else:
            scheduler.step(self.current_epoch + 1)


class WithMixin(LambMixin, Observed):
    """The rate is the mixin's."""

    cell: Cell
    lamb_lr = RATE
    lamb_options = {"weight_decay": 0.0}


class ByHand(Own):
    """Manual optimization."""

    automatic_optimization = False


class Bare(Observed):
    """For a LightningCLI."""

    cell: Cell


def halved_groups(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Matrices at the rate, vectors at half of it, as far as they train."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in trained if p.ndim > 1], "lr": rate},
        {"params": [(name, p) for name, p in trained if p.ndim < 2], "lr": rate / 2},
    ]
    return [group for group in groups if group["params"]]


class Data(LightningDataModule):
    """Holds the loader of a cell."""

    def __init__(self, make: Any, declares: int | None) -> None:
        super().__init__()
        self.make = make
        if declares is not None:
            self.batch_size = declares

    def train_dataloader(self) -> Any:
        return self.make()


class Growing(Data):
    """Its batches grow from epoch to epoch."""

    def train_dataloader(self) -> Any:
        return loader(batch_size=MICRO_BATCH * (1 + self.trainer.current_epoch))


def module_of(cell: Cell) -> Observed:
    """The module, with the loader if it makes that."""
    kind = {"own": Own, "mixin": WithMixin, "manual": ByHand, "stock_cli": Bare, "lamb_cli": Bare}
    feature, data = cell.of("module"), cell.of("loader")
    base = kind["own" if feature is None else feature.builder]
    members: dict[str, Any] = {"cell": cell}
    if data is not None and data.place == "module":
        members["train_dataloader"] = lambda self: data.make()
        if data.declares is not None:
            members["batch_size"] = data.declares
        if data.divides:
            members["setup"] = lambda self, stage: setattr(self, "batch_size", self.batch_size // 2)
    made: Observed = type("Made", (base,), members)()
    return made


def data_of(cell: Cell) -> dict[str, Any]:
    """What ``fit`` gets."""
    feature, callback = cell.of("loader") or SHUFFLED, cell.of("callback")
    if callback is not None and callback.place is not None and cell.of("loader") is None:
        feature = dataclasses.replace(feature, place=callback.place, declares=MICRO_BATCH)
    given: dict[str, Any] = {"val_dataloaders": loader(Samples(4))}
    if feature.place == "fit":
        return {"train_dataloaders": feature.make(), **given}
    if feature.place == "module":
        return given
    made = (Growing if feature.place == "growing" else Data)(feature.make, feature.declares)
    made.val_dataloader = lambda: loader(Samples(4))
    return {"datamodule": made}


def large_batch_of(cell: Cell) -> LargeBatch:
    """At 8 samples, from a base batch of 2, unless the features say something else."""
    plain = {"global_batch_size": GLOBAL_BATCH, "base_batch_size": MICRO_BATCH}
    return LargeBatch(**(plain | cell.options("large_batch")))


def trainer_options(cell: Cell, folder: Path) -> dict[str, Any]:
    """Everything but the callbacks."""
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "devices": cell.ranks,
        "strategy": "ddp" if cell.ranks > 1 else "auto",
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": cell.ranks > 1,
    }
    options |= cell.options("trainer")
    module = cell.of("module")
    if options.get("logger") is True and (module is None or not module.builder.endswith("cli")):
        from lightning.pytorch.loggers import CSVLogger

        options["logger"] = CSVLogger(folder)
    precision = cell.of("precision")
    if precision is not None:
        options |= precision.make()
    if options.get("barebones"):
        return options | {"accelerator": "cpu"}
    return options


def train(cell: Cell) -> Happened:
    """One training from its seed to its end, or to its refusal."""
    happened = Happened()
    with tempfile.TemporaryDirectory() as folder, quiet():
        seed_everything(1, verbose=False)
        try:
            module = module_of(cell)
            trainer, large_batch = fit(cell, module, Path(folder))
        except LightningLambError as error:
            happened.error, happened.by = str(error), "lightning_lamb"
        except Exception as error:  # noqa: BLE001 - a cell of the table may be anything
            happened.error, happened.by = f"{type(error).__name__}: {error}", "Lightning"
        else:
            happened.windows, happened.told = module.windows, module.told
            happened.left_over = [who for _, _, who in module.open]
            happened.global_step = trainer.global_step
            happened.announced = announced(large_batch)
            happened.suggestion = getattr(module, "lr", None)
    return happened


def fit(cell: Cell, module: Observed, folder: Path) -> tuple[Trainer, LargeBatch]:
    """The Trainer that has trained, and its LargeBatch."""
    large_batch, beside = large_batch_of(cell), cell.of("callback")
    callbacks: list[Any] = [large_batch]
    if beside is not None:
        callbacks.insert(0 if cell.last else 1, beside.make(folder))
    options = {"callbacks": callbacks, **trainer_options(cell, folder)}
    feature = cell.of("module")
    if feature is not None and feature.builder.endswith("cli"):
        trainer = trainer_of_cli(cell, module, options)
        module = trainer.cli_module
    elif options.get("barebones"):
        trainer = Trainer(**options)
    else:
        trainer = quiet_trainer(**options)
    trainer.fit(module, **data_of(cell))
    return trainer, large_batch


def trainer_of_cli(cell: Cell, module: Observed, options: dict[str, Any]) -> Any:
    """What a LightningCLI made of its command line."""
    optimizer, scheduler = cell.of("optimizer"), cell.of("scheduler")
    path = "lightning_lamb.Lamb" if optimizer is None else optimizer.cli
    arguments = [f"--optimizer={path}", f"--optimizer.lr={RATE}", *(scheduler.cli if scheduler is not None else ())]
    still = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

    def build() -> Observed:
        return module

    build.__qualname__ = f"build_{id(cell)}"  # the CLI makes a class of this name, once
    kind = LightningCLI if cell.of("module").builder == "stock_cli" else LambCLI
    cli = kind(
        build,
        args=arguments,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", **still, **options},
    )
    cli.trainer.cli_module = cli.model
    return cli.trainer


def announced(large_batch: LargeBatch) -> dict[str, Any]:
    """What LargeBatch says it did."""
    derived = large_batch.derived
    assert derived is not None
    return {
        "global_batch_size": derived.global_batch_size,
        "accumulation": derived.accumulate_grad_batches,
        "learning_rates": list(derived.learning_rates),
        "lr_factor": derived.lr_factor,
        "total_steps": derived.total_steps,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No tables and progress bars, and no warnings about small data."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def is_installed(cell: Cell) -> bool:
    """Whether all packages are there that the features need beside our own extras."""
    return all(not feature.needs or importlib.util.find_spec(feature.needs) for feature in cell.features)


def twin_rates(cell: Cell) -> list[list[float]]:
    """Learning rates of the same training by Lightning alone, on one rank: accumulation and rate set by hand."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        seed_everything(1, verbose=False)
        module: Any = module_of(cell)
        module.lr = RATE * SCALE
        options = trainer_options(dataclasses.replace(cell, ranks=1), Path(folder))
        beside = cell.of("callback").make(Path(folder))
        trainer = quiet_trainer(**options, callbacks=[beside], accumulate_grad_batches=GLOBAL_BATCH // MICRO_BATCH)
        trainer.fit(module, **data_of(cell))
    return [window.rates for window in module.windows]


torch.set_num_threads(1)
