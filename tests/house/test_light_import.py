"""``from lightning_lamb import Lamb`` costs no more than torch, and every public name can be had."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import lightning_lamb

OPTIONAL = (
    "lightning",
    "pytorch_lightning",
    "deepspeed",
    "triton",
    "matplotlib",
    "jsonargparse",
    "torchmetrics",
    "timm",
)


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*[name for name in {OPTIONAL!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "from lightning_lamb import Lamb, Lars, StagedWarmup",
        "from lightning_lamb import GroupRules, lamb_param_groups, make_plan, plan_from_recipe",
        "import lightning_lamb.presets, lightning_lamb.recipes, lightning_lamb.sharding",
    ],
)
def test_the_torch_side_imports_no_optional_package(statement: str):
    # torch itself may import some of them: only what comes on top of torch is ours.
    assert loaded_after(statement) <= loaded_after("import torch, torch.distributed.tensor")


def test_a_step_of_lamb_imports_no_optional_package():
    """On top of what a step of torch's own optimizers imports: its compiler, which imports triton."""
    weight = "import torch; w = torch.nn.Parameter(torch.ones(3, 3)); w.grad = torch.ones(3, 3); "
    step = weight + "from lightning_lamb import Lamb; Lamb([w]).step()"
    assert loaded_after(step) <= loaded_after(weight + "torch.optim.AdamW([w]).step()")


@pytest.mark.parametrize("name", lightning_lamb.__all__)
def test_every_public_name_exists(name: str):
    assert getattr(lightning_lamb, name) is not None
    assert name in dir(lightning_lamb)


def test_the_front_door_has_at_most_12_names():
    assert len([name for name in lightning_lamb.__all__ if not name.startswith("__")]) <= 12


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Lamp'"):
        lightning_lamb.Lamp


def test_optional_packages_of_this_test_are_real():
    """Guards the tests above against a misspelt name, which would always pass."""
    assert importlib.util.find_spec("lightning")
    assert importlib.util.find_spec("matplotlib")
