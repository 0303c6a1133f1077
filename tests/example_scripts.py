"""Where the examples lie, and how tests run and import them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def module(example: str, name: str) -> ModuleType:
    """Imports a module of an example, whose neighbours it finds as it does when run as a script."""
    folder = str(ROOT / "examples" / example)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def run(
    *arguments: str, folder: Path, check: bool = True, timeout: float = 290, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does; it writes its runs/ into ``folder``."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(result.stdout[-4000:] + result.stderr[-4000:])
    return result
