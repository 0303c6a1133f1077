"""Documents that lie are worse than none: every block is executed, or at least compiled and parsed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from markdown_blocks import PAGES, ROOT, Block, all_blocks, blocks_of, write_files

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # `python` is this one
}
# Commands that set a machine up: looked at, by the tests below, but not run by a test that runs in the result.
SET_UP = ("pip install", "git clone", "cd ", "bash ", "pre-commit install", "PYTHON=", "LAMB_VENV=")


def name(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def commands_of(block: Block) -> list[str]:
    """The commands of a bash block, continued lines joined."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_of_a_page_run_from_top_to_bottom(page: Path, tmp_path: Path):
    """One namespace per page. Each block keeps its line number, so a traceback points into the page."""
    lines = [""] * len(page.read_text(encoding="utf-8").splitlines())
    blocks = [b for b in blocks_of(page) if b.language == "python" and not b.is_exempt and not b.file_name]
    for block in blocks:
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    if not blocks:
        return
    write_files(page, tmp_path)
    script = f"page_{page.stem}.py"  # lightning.py would be imported in the place of Lightning
    (tmp_path / script).write_text("\n".join(lines), encoding="utf-8")
    run([sys.executable, script], tmp_path)


@pytest.mark.parametrize("block", all_blocks("python"), ids=name)
def test_a_python_block_compiles(block: Block):
    compile(block.code, name(block), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_bash_blocks_run(page: Path, tmp_path: Path):
    """What starts with python runs, in a folder that holds the page's own files; what sets up a machine does not."""
    write_files(page, tmp_path)
    for folder in ("examples", "configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for block in blocks_of(page):
        if block.language != "bash" or block.is_exempt:
            continue
        for command in commands_of(block):
            if command.startswith(SET_UP):
                continue
            assert command.startswith("python "), (
                f"{block}: '{command}' is of no kind that this test knows how to check"
            )
            run(["bash", "-c", command], tmp_path)


@pytest.mark.parametrize("block", all_blocks("bash"), ids=name)
def test_scripts_and_extras_that_bash_blocks_name_exist(block: Block):
    extras = importlib.metadata.metadata("lightning-lamb").get_all("Provides-Extra") or []
    for command in commands_of(block):
        for script in re.findall(r"\b(?:bash|python) ((?:examples|tests|scripts|\.ci)/\S+)", command):
            assert (ROOT / script).is_file(), f"{block}: no {script}"
        if "pip install" in command:
            named = re.findall(r"\[([\w,-]+)\]", command)
            assert {extra for group in named for extra in group.split(",")} <= set(extras), f"{block}: {command}"


def test_json_blocks_parse():
    for block in all_blocks("json"):
        assert json.loads(block.code), str(block)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=name)
def test_a_yaml_block_fits_the_signatures_it_configures(block: Block, tmp_path: Path):
    """Parsed by LambCLI against the real classes, on the digits example's model and data."""
    assert isinstance(yaml.safe_load(block.code), dict)
    (tmp_path / "config.yaml").write_text(block.code, encoding="utf-8")
    train = ROOT / "examples" / "digits" / "train.py"
    run([sys.executable, str(train), "fit", "--config", "config.yaml", "--print_config"], tmp_path)


def test_every_block_has_a_language_that_is_checked():
    checked = {"python", "bash", "yaml", "json", "text"}
    unknown = [str(b) for page in PAGES for b in blocks_of(page) if b.language not in checked]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page: Path):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]
