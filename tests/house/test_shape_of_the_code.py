"""Sizes, names and layers: what CONTRIBUTING.md promises about the shape of the code."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "lightning_lamb").rglob("*.py"))
OURS = PACKAGE + sorted((ROOT / "examples").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))
MEANINGLESS_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "core", "tools"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_besides_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_a_file_has_at_most_400_lines(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", [path for path in OURS if "tests" not in path.parts], ids=relative)
def test_a_function_has_at_most_50_lines_besides_its_docstring(path: Path):
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = {f.name: size for f in functions if (size := lines_besides_docstring(f)) > 50}
    assert not too_long


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_a_file_is_named_after_its_concept(path: Path):
    assert not MEANINGLESS_NAMES & {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_a_module_says_what_it_is_for_and_postpones_annotations(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "no module docstring"
    if any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree)):
        assert "from __future__ import annotations" in path.read_text()


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_the_library_neither_prints_nor_exits_nor_leaves_work_undone(path: Path):
    text = path.read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text]
    if path.name == "__main__.py":
        return
    calls = [n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not {"print", "exit", "breakpoint"} & set(calls)


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_only_the_seams_reach_into_the_trainer_privately(path: Path):
    """``trainer._x`` and ``fit_loop._x`` change between Lightning's minor versions: the seams know."""
    if path.match("lightning*_seams.py"):
        return
    private = [
        f"{ast.unparse(node)} (line {node.lineno})"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1] in {"trainer", "fit_loop", "epoch_loop", "strategy"}
    ]
    assert not private


def test_imports_point_down_and_optional_packages_stay_in_their_files():
    lint_imports = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert lint_imports, "install the lint extra"
    result = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
