"""The compiler at first use: many processes at once, a broken cache, no cache, no compiler, another processor."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tolerances import assert_close

from lightning_lamb import Lamb
from lightning_lamb.errors import InvalidOptionError
from lightning_lamb.kernels import cpu, cpu_library, eager
from lightning_lamb.optimizers import choice
from tests.kernels.batches import Case, assert_as_eager, batch_of

ONE_STEP = """
import sys, torch
sys.path[:0] = {path!r}
from lightning_lamb import Lamb
from lightning_lamb.kernels import cpu_library
weight = torch.nn.Parameter(torch.ones(4, 4))
weight.grad = torch.ones(4, 4)
Lamb([weight], {options}).step()
print(float(weight.detach().sum()), cpu_library.missing_because())
"""
ROOT = str(Path(cpu_library.__file__).parents[2])


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked for the library yet, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_warned", False)
    monkeypatch.setattr(cpu_library, "_failures", {})
    for known in (cpu_library.library, cpu_library._compiler):
        known.cache_clear()
    yield tmp_path
    for known in (cpu_library.library, cpu_library._compiler):
        known.cache_clear()


def one_step(cache: Path, options: str = "fused=True", **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"XDG_CACHE_HOME": str(cache)} | environment
    code = ONE_STEP.format(path=[ROOT], options=options)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=250)


def libraries(cache: Path) -> list[Path]:
    return sorted((cache / "lightning_lamb").glob("*.so"))


@pytest.mark.parametrize("processes", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_many_processes_at_once_compile_one_library_and_all_step(tmp_path, processes):
    with ThreadPoolExecutor(processes) as pool:
        results = list(pool.map(lambda _: one_step(tmp_path), range(processes)))
    assert {result.returncode for result in results} == {0}, [result.stderr[-500:] for result in results]
    assert len({result.stdout for result in results}) == 1
    assert len(libraries(tmp_path)) == 1
    assert not [path for path in (tmp_path / "lightning_lamb").iterdir() if path.is_dir()], "temporary folders are left"


def test_the_library_is_compiled_once_and_then_found(fresh):
    cpu_library.library()
    (path,) = libraries(fresh)
    before = path.stat().st_mtime_ns
    cpu_library.library.cache_clear()
    start = time.perf_counter()
    cpu_library.library()
    assert path.stat().st_mtime_ns == before
    assert time.perf_counter() - start < 5, "that took as long as to compile it again"


@pytest.mark.parametrize("damage", [lambda code: code[: len(code) // 2], lambda code: b"", lambda code: code + b"x"])
def test_a_damaged_library_is_made_again(fresh, damage):
    cpu_library.library()
    (path,) = libraries(fresh)
    whole = path.read_bytes()
    path.unlink()  # not in place: this process runs the code
    path.write_bytes(damage(whole))
    cpu_library.library.cache_clear()
    assert cpu_library.missing_because() is None
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(fresh, monkeypatch):
    blocked = fresh / "a file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert cpu_library.missing_because() is None
    assert not libraries(fresh)


def test_a_folder_of_somebody_else_is_not_used(fresh, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cpu_library.missing_because() is None
    assert not libraries(fresh)


def test_without_a_compiler_one_message_and_foreach(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    weights = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for weight in weights:
            weight.grad = torch.ones(3, 3)
            Lamb([weight]).step()
    (message,) = [str(warning.message) for warning in caught if "fused" in str(warning.message)]
    for part in ("CC=no-such-compiler is not on the PATH", "foreach", cpu_library.SWITCH):
        assert part in message
    assert not torch.equal(weights[1], torch.ones(3, 3))


def test_fused_without_a_compiler_is_refused_at_once(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(InvalidOptionError, match=r"no-such-compiler is not on the PATH.*foreach"):
        Lamb([torch.nn.Parameter(torch.ones(2))], fused=True)


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert "failed with exit code 1" in str(cpu_library.missing_because())


def test_switched_off_it_is_silent(tmp_path):
    result = one_step(tmp_path, options="", LIGHTNING_LAMB_CPU_KERNEL="0")
    assert result.returncode == 0, result.stderr
    assert "switches it off" in result.stdout
    assert "No fused CPU kernel" not in result.stderr
    assert not libraries(tmp_path)


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_the_library_for_any_processor_of_this_kind_computes_the_same(fresh, monkeypatch, state_dtype):
    """What a processor without the widest vectors runs, and a compiler that does not know ``-march=native``."""
    monkeypatch.setattr(cpu_library, "THIS_PROCESSOR", (("-march=no-such-processor",), ()))
    case = Case(dtype=torch.float32, state_dtype=state_dtype)
    weights = [torch.randn(size) for size in (1, 100, 70000)]
    if state_dtype is None:
        assert_as_eager(cpu, case, batch_of(case, weights, step=3), "float32")
        return
    batch, expected = (batch_of(case, [weight.clone() for weight in weights], step=3) for _ in range(2))
    for kernel, each in ((cpu, batch), (eager, expected)):
        kernel.step(each, [0.01] * 3, None, None)
    for one, other in zip(batch.weights, expected.weights, strict=True):
        assert_close(one, other, "bf16 weight")


def test_job_is_laid_out_as_in_c():
    assert ctypes.sizeof(cpu.Job) == cpu_library.library().lamb_job_size()


def test_a_compiler_that_fails_is_tried_once(fresh, monkeypatch):
    """Without the C library's headers, say. Every batch of every step tried again, up to forty times a step."""
    log, compiler = fresh / "log", fresh / "cc"
    compiler.write_text(f'#!/bin/sh\necho run >> {log}\n[ "$1" = --version ] && exit 0\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))

    def runs() -> int:
        return len(log.read_text().splitlines())

    parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(6)]
    groups = [{"params": [parameter], "weight_decay": 0.01 * index} for index, parameter in enumerate(parameters)]
    optimizer = Lamb(groups)
    with pytest.warns(UserWarning, match="No fused CPU kernel"):
        parameters[0].grad = torch.ones(4, 4)
        optimizer.step()
    tried = runs()
    assert 1 <= tried <= 1 + len(cpu_library.THIS_PROCESSOR)
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.ones(4, 4) if (index + step) % 3 else None
        optimizer.step()
    assert cpu_library.missing_because() is not None
    assert runs() == tried
    monkeypatch.delenv("CC")  # somebody who mends it in a running process is heard
    cpu_library._compiler.cache_clear()
    assert cpu_library.missing_because() is None
