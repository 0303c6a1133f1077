"""Memory that one optimizer step needs on top of weights, gradients and state.

Measured in a process of its own. On the CPU: the highest resident size during one step (Linux's ``VmHWM``, reset just
before it) less the resident size before it. Two things would hide temporaries and are prevented: the first steps
allocate the state, so they come before; and glibc keeps freed blocks, so the parent tells it to give them back at
once. On CUDA: torch's allocator statistics.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.optim import Optimizer

import shapes
from contenders import CONTENDERS


def measure(contender: str, shapes_text: str, device: str) -> dict[str, int] | None:
    """Measures in a fresh process.

    Args:
        contender: its name.
        shapes_text: as for ``shapes.parse``.
        device: "cpu" or "cuda".

    Returns:
        ``{"peak_extra": bytes, "state": bytes, "parameters": bytes}``, or None where this system cannot tell.
    """
    give_back_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--contender", contender, "--shapes", shapes_text, "--device", device]
    result = subprocess.run(command, env=os.environ | give_back_at_once, capture_output=True, text=True, check=False)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def main() -> None:
    """The child process."""
    parser = argparse.ArgumentParser()
    for option in ("--contender", "--shapes", "--device"):
        parser.add_argument(option, required=True)
    args = parser.parse_args()
    (contender,) = [each for each in CONTENDERS if each.name == args.contender]
    params = [torch.nn.Parameter(torch.randn(s, device=args.device)) for s in shapes.parse(args.shapes)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = contender.build(params)
    for _ in range(2):
        optimizer.step()
    gc.collect()
    extra = _peak_extra_of_a_step(optimizer, args.device)
    parameters = sum(param.nbytes for param in params)
    print(json.dumps({"peak_extra": extra, "state": _state_bytes(optimizer), "parameters": parameters}))


def _state_bytes(optimizer: Optimizer) -> int:
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors)


def _peak_extra_of_a_step(optimizer: Optimizer, device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM := VmRSS
    before = _status_bytes("VmRSS")
    optimizer.step()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main()
