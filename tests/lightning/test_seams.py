"""What this package takes for granted about Lightning's insides, so that a new Lightning that differs is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_lamb import LargeBatch, lightning_seams
from lightning_lamb.callbacks.position import Position, write_position
from lightning_lamb.errors import MissingDependencyError
from tests.lightning.toys import Batches, Regression, quiet_trainer, regression_data


def python(code: str) -> str:
    """Runs code in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_that_is_imported_already_is_used() -> None:
    code = "import {}; from lightning_lamb import lightning_seams as s; print(s.pl.__name__, s.Callback.__module__)"
    assert python(code.format("pytorch_lightning")).startswith("pytorch_lightning pytorch_lightning.")


MISSING = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
import lightning_lamb
lightning_lamb.Lamb
try:
    lightning_lamb.{name}
except lightning_lamb.errors.MissingDependencyError as error:
    print("missing:", error)
else:
    print(lightning_lamb.lightning_seams.pl.__name__)
"""


def test_without_lightning_the_message_says_what_to_install() -> None:
    both = "{'lightning', 'pytorch_lightning'}"
    assert 'pip install "lightning_lamb[lightning]"' in python(MISSING.format(refused=both, name="LargeBatch"))
    assert "pytorch_lightning" in python(MISSING.format(refused="{'lightning'}", name="LargeBatch"))
    assert 'pip install "lightning_lamb[cli]"' in python(MISSING.format(refused="{'jsonargparse'}", name="LambCLI"))


def test_missing_dependency_errors_are_import_errors() -> None:
    assert issubclass(MissingDependencyError, ImportError)


def test_every_semi_private_attribute_is_there() -> None:
    """One look at each attribute that lightning_seams reads or writes, in the middle of a real fit."""

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert module._trainer is trainer
            assert trainer.strategy.model is not None
            assert trainer.distributed_sampler_kwargs is None
            assert trainer.strategy.handles_gradient_accumulation is False
            assert trainer.strategy.restore_checkpoint_after_setup is False
            assert trainer._checkpoint_connector._loaded_checkpoint == {}
            assert isinstance(trainer._logger_connector.should_update_logs, bool)
            assert isinstance(trainer.fit_loop._should_accumulate(), bool)
            assert trainer.fit_loop._data_source.instance is trainer.datamodule
            assert len(trainer.fit_loop._combined_loader.flattened) == 1
            assert trainer.lr_scheduler_configs is trainer.strategy.lr_scheduler_configs
            passes = trainer.fit_loop._combined_loader._iterator
            assert len(passes.iterables) == len(passes.iterators) == 1
            assert callable(trainer.fit_loop.epoch_loop._update_learning_rates)
            saved = trainer.fit_loop.state_dict()
            assert saved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
            progress = saved["epoch_loop.batch_progress"]
            assert progress["total"]["ready"] == progress["current"]["ready"] == batch_idx + 1
            looks.append(batch_idx)

    looks: list[int] = []
    trainer = quiet_trainer(max_epochs=1, callbacks=[LargeBatch(8, warmup_steps=1), Look()])
    trainer.fit(Regression(), datamodule=Batches(regression_data(16), 4))
    assert looks == [0, 1, 2, 3]


@pytest.mark.parametrize(("saved", "now", "ready"), [(4, 2, 6), (4, 8, 24), (4, 4, 12)])
def test_progress_is_rewritten_to_a_position_in_this_runs_micro_batches(saved: int, now: int, ready: int) -> None:
    counters = {"ready": 15, "started": 15, "processed": 14, "completed": 14}
    epochs = {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    progress = {"total": dict(counters), "current": dict(counters), "is_last_batch": True}
    loops = {
        "epoch_loop.batch_progress": progress,
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
    }
    where = write_position({"loops": {"fit_loop": loops}}, Position(1, 12), (saved, 8), (now, 8))
    assert where == Position(1, ready)
    for part in ("total", "current"):
        assert progress[part] == {"ready": ready, "started": ready, "processed": ready, "completed": ready - 1}
        assert loops["epoch_progress"][part] == epochs
    assert progress["is_last_batch"] is False


def test_no_other_file_touches_a_private_attribute_of_lightnings() -> None:
    """ruff's SLF001 sees to private attributes; this sees to it that only seams are exempted from it."""
    package = Path(lightning_seams.__file__).parent
    for path in (*package.glob("callbacks/*.py"), package / "mixin.py", package / "cli.py"):
        assert "SLF001" not in path.read_text(), path
