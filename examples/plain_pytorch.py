"""Lamb and StagedWarmup in a plain PyTorch loop: 256 samples per step, accumulated from micro-batches of 32.

python examples/plain_pytorch.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lamb import Lamb, StagedWarmup
from lightning_lamb.scaling import accumulate_grad_batches, scaled_lr

torch.manual_seed(0)
digits = load_digits()
dataset = TensorDataset(torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target))
train, test = torch.utils.data.random_split(dataset, [1536, len(dataset) - 1536])
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

epochs, global_batch, micro_batch = 30, 256, 32
accumulation = accumulate_grad_batches(global_batch, micro_batch, data_parallel_size=1)
lr = scaled_lr(5e-3, base_batch_size=32, batch_size=global_batch)  # found at 32 samples
optimizer = Lamb(model.named_parameters(), lr=lr, max_grad_norm=1.0)
schedule = StagedWarmup(optimizer, total_steps=epochs * len(train) // global_batch, warmup_fraction=0.1)

for _epoch in range(epochs):
    for index, (images, labels) in enumerate(DataLoader(train, micro_batch, shuffle=True), start=1):
        loss = nn.functional.cross_entropy(model(images), labels)
        (loss / accumulation).backward()
        if index % accumulation == 0:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

images, labels = next(iter(DataLoader(test, len(test))))
print(f"test accuracy {(model(images).argmax(1) == labels).float().mean():.3f}")
print({name: round(ratio.item(), 3) for name, ratio in optimizer.trust_ratios.items()})
