"""Lamb in Lightning Fabric, with accumulation: FABRIC decides devices, strategy and precision, the loop stays yours.

python examples/fabric_lamb.py
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lamb import Lamb, StagedWarmup
from lightning_lamb.scaling import accumulate_grad_batches, scaled_lr

fabric = Fabric(accelerator="auto", devices=1)
fabric.launch()
fabric.seed_everything(0)
digits = load_digits()
dataset = TensorDataset(torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target))
train, test = torch.utils.data.random_split(dataset, [1536, len(dataset) - 1536])
epochs, global_batch, micro_batch = 30, 256, 32
accumulation = accumulate_grad_batches(global_batch, micro_batch, fabric.world_size)
lr = scaled_lr(5e-3, base_batch_size=32, batch_size=global_batch)  # found at 32 samples

model = fabric.setup_module(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))
lamb = Lamb(model.named_parameters(), lr=lr, max_grad_norm=1.0)  # after setup_module: FSDP replaces parameters there
optimizer = fabric.setup_optimizers(lamb)
schedule = StagedWarmup(lamb, total_steps=epochs * len(train) // global_batch, warmup_fraction=0.1)
loader = fabric.setup_dataloaders(DataLoader(train, micro_batch, shuffle=True))

for _epoch in range(epochs):
    for index, (images, labels) in enumerate(loader, start=1):
        step_now = index % accumulation == 0
        with fabric.no_backward_sync(model, enabled=not step_now):
            fabric.backward(nn.functional.cross_entropy(model(images), labels) / accumulation)
        if step_now:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

images, labels = (tensor.to(fabric.device) for tensor in next(iter(DataLoader(test, len(test)))))
fabric.print(f"test accuracy {(model(images).argmax(1) == labels).float().mean():.3f}")
fabric.print({name: round(ratio.item(), 3) for name, ratio in lamb.trust_ratios.items()})
