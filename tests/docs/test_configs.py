"""Every YAML in configs/ fits the classes it names, and survives being printed and read again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def script_of(config: Path) -> str:
    """The one that the config's first lines say it is for."""
    found = re.search(r"python (examples/\w+/train\.py) fit --config", config.read_text(encoding="utf-8"))
    assert found
    return str(ROOT / found[1])


def printed_config(config: Path, script: str) -> str:
    command = [sys.executable, script, "fit", "--config", str(config), "--print_config"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_fits_the_real_signatures_and_round_trips(config: Path, tmp_path: Path):
    if "deepspeed" in config.name:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    printed = printed_config(config, script_of(config))
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    assert printed_config(tmp_path / "printed.yaml", script_of(config)) == printed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_says_how_to_run_it(config: Path):
    text = config.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    assert text.startswith("#")
    assert f"configs/{config.name}" in text


def test_there_are_configs():
    assert CONFIGS
