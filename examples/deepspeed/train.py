"""Digits with LAMB under DeepSpeed, without Lightning: everything about the optimizer stands in the JSON.

python examples/deepspeed/train.py --config configs/deepspeed/zero2.json
deepspeed --num_gpus 2 examples/deepspeed/train.py --config configs/deepspeed/zero2.json
DS_ACCELERATOR=cpu deepspeed --num_gpus 2 examples/deepspeed/train.py --config configs/deepspeed/zero2.json    # no GPU
"""

from __future__ import annotations

import argparse
import os

import deepspeed
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightning_lamb.deepspeed  # noqa: F401 - makes "LightningLamb" and "StagedWarmup" known in the config


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/deepspeed/zero2.json", help="a DeepSpeed config")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--save", help="folder for a checkpoint at the end")
    parser.add_argument("--resume", help="folder of a checkpoint to continue from")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1437 training and 360 test images of 8 x 8."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().flatten(1) / 8.0 - 1.0
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def main() -> None:
    options = arguments()
    if "RANK" not in os.environ:  # started by python, not by a launcher
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=options.config)
    if options.resume:
        engine.load_checkpoint(options.resume)

    train_set, test_set = digits()
    sampler = DistributedSampler(train_set, shuffle=True)
    loader = DataLoader(train_set, engine.train_micro_batch_size_per_gpu(), sampler=sampler, drop_last=True)
    dtype = next(engine.module.parameters()).dtype
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            logits = engine(images.to(engine.device, dtype))
            loss = F.cross_entropy(logits.float(), labels.to(engine.device))
            engine.backward(loss)
            engine.step()
    with torch.no_grad():
        images, labels = test_set.tensors
        correct = engine(images.to(engine.device, dtype)).argmax(1).cpu() == labels
    if torch.distributed.get_rank() == 0:
        ratios = engine.basic_optimizer.trust_ratios
        print("trust ratios", {name: round(float(ratio), 4) for name, ratio in ratios.items()})
        print(f"steps {engine.global_steps}  learning rate {engine.get_lr()[0]:.5f}")
        print(f"test accuracy {correct.float().mean():.3f}")
    if options.save:
        engine.save_checkpoint(options.save)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
