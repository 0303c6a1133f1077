"""Memory that a rank holds under ZeRO 0 to 3, measured on the CPU, beside what the plan says.

DS_ACCELERATOR=cpu python examples/deepspeed/memory_per_rank.py --ranks 4 --width 1536 --layers 16 --precision bf16-true

Starts its ranks itself. Measured before the third optimizer step, when weights, gradients, masters and moments are all
there: the tensors of a rank, and how much its process has grown since before the model was made.
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
from torch import nn

from lightning_lamb.footprint import STRATEGIES, held_bytes


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--precision", choices=["32-true", "bf16-true"], default="bf16-true")
    parser.add_argument("--stage", type=int, help="measure one stage on this rank (used by the script itself)")
    return parser.parse_args()


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tensor_bytes() -> int:
    """Memory of all tensors that are alive, shared memory once."""
    storages = [found.untyped_storage() for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(options: argparse.Namespace) -> None:
    """One stage on one of the ranks; rank 0 prints bytes and the number of parameters."""
    import deepspeed

    from lightning_lamb import Lamb

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    torch.distributed.barrier()
    small = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000, "overlap_comm": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": options.precision == "bf16-true"},
        "zero_optimization": {"stage": options.stage, **small},
    }
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
    before = resident_bytes()
    with deepspeed.zero.Init(enabled=options.stage == 3, config_dict_or_path=config):
        layers = [nn.Linear(options.width, options.width, bias=False) for _ in range(options.layers)]
    model = nn.Sequential(*layers).to(dtype)
    del layers
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=Lamb(model.parameters()), config=config)
    for step in range(3):
        engine.backward(engine(torch.ones(1, options.width, dtype=dtype)).float().square().mean())
        if step < 2:
            engine.step()
    held = resident_bytes() - before
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"parameters": parameters, "process": held, "tensors": tensor_bytes()}))
    torch.distributed.barrier()
    os._exit(0)


def spawn(options: argparse.Namespace, stage: int) -> dict[str, int]:
    """Runs one stage on all ranks; what rank 0 printed."""
    processes = []
    for rank in range(options.ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29600 + stage), "DS_ACCELERATOR": "cpu"}
        # Freed memory goes back to the system at once, so that what is resident is what is held.
        place |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "--stage", str(stage), "--width", str(options.width)]
        command += ["--layers", str(options.layers), "--precision", options.precision]
        processes.append(
            subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    output, errors = processes[0].communicate(timeout=600)
    for process in processes[1:]:
        process.communicate(timeout=60)
    lines = [line for line in output.decode().splitlines() if line.startswith('{"parameters"')]
    if not lines:
        raise RuntimeError(errors.decode()[-3000:])
    return json.loads(lines[-1])


def main() -> None:
    options = arguments()
    if options.stage is not None:
        measure(options)
    for stage, strategy in enumerate(STRATEGIES):
        found = spawn(options, stage)
        planned = held_bytes(found["parameters"], options.ranks, options.precision)[strategy].total
        print(
            f"stage {stage}  {found['parameters'] / 1e6:.1f} M parameters, {options.ranks} ranks, {options.precision}: "
            f"plan {planned / 2**20:.0f} MiB, tensors {found['tensors'] / 2**20:.0f} MiB, "
            f"process {found['process'] / 2**20:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
