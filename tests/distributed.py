"""Runs a function on N processes that can form a gloo group, with a deadline, and brings back what each returned.

    results = run_ranks(worker, 2, argument, timeout=60)      # [worker's result on rank 0, on rank 1]

`worker` is a function at the top of a module, called as ``worker(argument)`` on every rank; inside, ``rank()`` and
``world_size()`` tell where it runs. Every process is a fresh interpreter (spawn), computes on one thread, and is killed
when another rank has failed or the deadline has passed: a hanging collective costs the deadline, never the suite.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # of Linux's prctl

GRACE_AFTER_FAILURE = 3.0
"""Seconds that the other ranks get to report their own error when one has failed."""


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds the tracebacks and the end of each rank's output."""


def rank() -> int:
    """This process's rank."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"])


def run_ranks(
    worker: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 240.0,
    init_group: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Calls ``worker(*arguments)`` on ``ranks`` new processes.

    Args:
        worker: a function at module level (it is pickled by name).
        ranks: the number of processes.
        *arguments: anything that pickles.
        timeout: seconds for everything, the start of the interpreters included.
        init_group: form the default gloo group before the call. False for code that forms it itself (a Trainer).
        environment: more environment variables of the processes.

    Returns:
        The results by rank. They travel pickled, so tensors come back as copies.

    Raises:
        RankError: a rank raised, died or did not finish in time.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], []
        port = _free_port()
        for index in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            variables = _variables(index, ranks, port) | (environment or {})
            plan = (worker, arguments, init_group, Path(folder), time.time() + timeout, variables)
            with _environment(variables):  # what is read at start-up, OMP_NUM_THREADS, must be there before
                process = context.Process(target=_run_rank, args=(index, ranks, sender, *plan), daemon=True)
                process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        try:
            return _collect(processes, connections, time.monotonic() + timeout, Path(folder))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join(10)
            for connection in connections:
                connection.close()


def _variables(index: int, ranks: int, port: int) -> dict[str, str]:
    """What torch and Lightning read to find the group."""
    return {
        "RANK": str(index),
        "LOCAL_RANK": str(index),  # tells Lightning that the processes exist already
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    """Sets environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run_rank(
    index: int,
    ranks: int,
    sender: Connection,
    worker: Callable[..., Any],
    arguments: tuple[Any, ...],
    init_group: bool,
    folder: Path,
    deadline: float,
    variables: dict[str, str],
) -> NoReturn:
    """Body of one process: output to a file, the result or the traceback to the pipe."""
    os.environ.update(variables)
    _die_with_parent()
    output = (folder / f"rank{index}.txt").open("w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    # Where was it hanging? The stacks reach the parent with the output.
    faulthandler.dump_traceback_later(max(1.0, deadline - time.time() - 3.0), file=output)
    ok, value = True, None
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if init_group:
            dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=index, world_size=ranks)
        value = worker(*arguments)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - everything that ends a rank is a result
        ok, value = False, traceback.format_exc()
    try:
        # Plain pickle copies tensors; the connection's own pickler would share memory that dies with this process.
        message = pickle.dumps((ok, value))
    except Exception:  # noqa: BLE001
        message = pickle.dumps((False, f"the result of rank {index} does not pickle\n{traceback.format_exc()}"))
    with contextlib.suppress(BrokenPipeError):
        sender.send_bytes(message)
    sender.close()
    output.flush()
    os._exit(0 if ok else 1)  # skips the teardown of groups whose other ranks may be gone


def _die_with_parent() -> None:
    """A test process that is killed, by its time limit say, cannot clean up: its ranks would compute on, unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _collect(processes: list[Any], connections: list[Connection], deadline: float, folder: Path) -> list[Any]:
    """Waits for every rank's message; gives up soon after the first failure, or at the deadline."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    pending = dict(enumerate(connections))
    while pending and time.monotonic() < deadline:
        ready = wait(list(pending.values()), timeout=max(0.0, deadline - time.monotonic()))
        for index in [i for i, connection in pending.items() if connection in ready]:
            try:
                ok, value = pickle.loads(pending[index].recv_bytes())
            except EOFError:
                processes[index].join(5)
                ok, value = False, f"died with exit code {processes[index].exitcode}"
            (results if ok else failures)[index] = value
            del pending[index]
        if failures:
            deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
    if not failures and not pending:
        return [results[index] for index in range(len(processes))]
    for index in pending:
        failures.setdefault(index, "did not finish" + ("" if len(failures) == 0 else " (killed: another rank failed)"))
    raise RankError(_report(failures, folder))


def _report(failures: dict[int, str], folder: Path, lines: int = 40) -> str:
    """One text with every failed rank's traceback and the end of its output."""
    parts = []
    for index, text in sorted(failures.items()):
        log = folder / f"rank{index}.txt"
        tail = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
        parts.append("\n".join([f"--- rank {index} of the test: {text}", *(f"    | {line}" for line in tail)]))
    return "\n".join(["", *parts])
