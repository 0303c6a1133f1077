"""Makes the CPU kernel at first use: compiles `lamb_cpu.c` with the system's C compiler and keeps the result.

Nothing is built at install. The first step of a process looks for the library in the user's cache; if it is not there,
it is compiled, which takes about two seconds, once per user, machine type and version of this package. Any number of
processes may start at once. The cache is ``$XDG_CACHE_HOME/lightning_lamb`` (``~/.cache/lightning_lamb``), or a
temporary folder where that cannot be written.

``LIGHTNING_LAMB_CPU_KERNEL=0`` switches the kernel off; ``CC`` names another compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SWITCH = "LIGHTNING_LAMB_CPU_KERNEL"
ENVIRONMENT = (SWITCH, "CC", "PATH", "XDG_CACHE_HOME", "HOME")
"""Where one of these changes, a compiler that failed is tried again."""
SOURCES = ("lamb_cpu.c", "lamb_pass.h", "lamb_avx512.h", "lamb_avx512_pass.h")
COMPILERS = ("cc", "gcc", "clang")
# Not -ffast-math: NaN and infinity must come out as they do in the equations.
MATH = ("-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*MATH, "-fvisibility=hidden", "-shared", "-fPIC", "-w")
LIBRARIES = ("-lpthread", "-lm", "-ldl")
THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
"""Compilers know one of the first two; the third makes a library for any processor of this kind, and a slower one."""
DIGEST_BYTES = 32
PATIENCE = 60.0
"""Seconds to wait for another process that is compiling before compiling as well."""

_failures: dict[tuple[str | None, ...], str] = {}


class NoLibraryError(Exception):
    """Why there is no CPU kernel here; the message says what to do about it."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel, loaded once per process; a failure is remembered, too, and the compiler not tried again.

    Raises:
        NoLibraryError: switched off, no compiler, or a compiler that fails.
    """
    asked = tuple(map(os.environ.get, ENVIRONMENT))
    if asked not in _failures:
        try:
            return _made()
        except NoLibraryError as error:
            _failures[asked] = str(error)
    raise NoLibraryError(_failures[asked])


def _made() -> ctypes.CDLL:
    if switched_off():
        raise NoLibraryError(f"the environment variable {SWITCH} switches it off")
    if os.name != "posix":
        raise NoLibraryError(f"it is written for Linux and macOS, this is {platform.system()}")
    compiler = _compiler()
    name = f"lamb_cpu-{_key(compiler)}.so"
    for folder in _folders():
        path = folder / name
        with contextlib.suppress(OSError):
            if not _is_whole(path):
                with _alone(path.with_suffix(".lock")):
                    if not _is_whole(path):
                        _compile(compiler, path)
            return _loaded(path)
    raise NoLibraryError("neither the user's cache folder nor a temporary folder lets a library be written and loaded")


def switched_off() -> bool:
    """Whether the user does not want a CPU kernel."""
    return os.environ.get(SWITCH, "1").lower() in ("0", "false", "no", "off")


def missing_because() -> str | None:
    """Why there is no CPU kernel here, or None if there is one. Compiles it if need be."""
    try:
        library()
    except NoLibraryError as reason:
        return str(reason)
    return None


@cache
def _compiler() -> tuple[str, ...]:
    named = os.environ.get("CC")
    for candidate in (named,) if named else COMPILERS:
        command = shlex.split(candidate)
        found = shutil.which(command[0]) if command else None
        if found:
            return (found, *command[1:])
    looked = f"CC={named} is not" if named else f"none of {', '.join(COMPILERS)} is"
    raise NoLibraryError(f"{looked} on the PATH; install a C compiler (Debian and Ubuntu: apt install gcc libc6-dev)")


def _key(compiler: tuple[str, ...]) -> str:
    """Changes with the source, the compiler, its flags and the processor: homes are shared between unlike machines."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, text=True).stdout
    for part in (*compiler, version, *FLAGS, platform.system(), platform.machine(), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _processor() -> str:
    """The instructions that ``-march=native`` may use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features", "isa")):
                return line
    return platform.processor()


def _folders() -> Iterator[Path]:
    """Folders of this user alone: loading a library that somebody else may write is running their code."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(base).expanduser() / "lightning_lamb"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            yield folder
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="lightning_lamb-") as temporary:
        yield Path(temporary)  # gone when the library is loaded; this process keeps what it has mapped


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    """Compiles to a file beside ``path`` and moves it there in one go, so that nobody ever loads half a library."""
    with tempfile.TemporaryDirectory(prefix=path.stem, dir=path.parent) as folder:
        target, source = Path(folder) / path.name, Path(__file__).parent / SOURCES[0]
        for processor in THIS_PROCESSOR:
            command = [*compiler, *FLAGS, *processor, "-o", str(target), str(source), *LIBRARIES]
            try:
                result = subprocess.run(command, capture_output=True, check=False, text=True, timeout=300)
            except (OSError, subprocess.SubprocessError) as error:
                raise NoLibraryError(f"{shlex.join(command)} could not run: {error}") from error
            if result.returncode == 0 and target.exists():
                break
        else:
            last = (result.stderr or result.stdout).strip()[-500:]
            raise NoLibraryError(f"{shlex.join(command)} failed with exit code {result.returncode}: {last}")
        code = target.read_bytes()
        target.write_bytes(code + hashlib.sha256(code).digest())  # loaders ignore what follows the last section
        target.replace(path)


def _is_whole(path: Path) -> bool:
    """Whether the file is there and is what was written, rather than cut short by a full disk."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Lets one process at a time compile. Only saves work: without a lock all would compile the same file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as handle:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        yield


def _loaded(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    found.lamb_run.argtypes = [ctypes.c_void_p]
    found.lamb_advance.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    for name in ("lamb_run", "lamb_advance", "lamb_knows_float16"):
        getattr(found, name).restype = ctypes.c_int32
    found.lamb_job_size.restype = ctypes.c_int64
    return found
