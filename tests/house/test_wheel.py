"""What `pip install lightning-lamb` puts on a machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_lamb

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the sources so that no `build/` left in the checkout leaks into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lightning_lamb", "tests/house", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation: the build must work where no index can be reached, and setuptools is in the environment.
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(source / "dist"),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"lightning_lamb", f"lightning_lamb-{lightning_lamb.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if re.search(r"(^|/)(tests?|examples)/|__pycache__", name)]


def test_the_wheel_holds_every_module_every_kernel_source_and_py_typed(wheel: zipfile.ZipFile):
    """The C sources are compiled at first use: missing ones would show only as a slow optimizer."""
    files = (path for path in (ROOT / "lightning_lamb").rglob("*") if path.suffix in {".py", ".c", ".h"})
    assert {str(path.relative_to(ROOT)) for path in files} | {"lightning_lamb/py.typed"} <= set(wheel.namelist())


def test_every_folder_of_the_package_has_an_init():
    """setuptools leaves out a folder without one, and an editable install hides that."""
    folders = {path.parent for path in (ROOT / "lightning_lamb").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_torch_is_the_only_hard_dependency(wheel: zipfile.ZipFile):
    (metadata_name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    metadata = wheel.read(metadata_name).decode()
    hard = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(hard) == 1
    assert hard[0].startswith("Requires-Dist: torch")
    assert f"Version: {lightning_lamb.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_the_version_is_the_same_everywhere():
    assert f"version: {lightning_lamb.__version__}" in (ROOT / "CITATION.cff").read_text()
