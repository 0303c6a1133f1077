"""Stochastic rounding to bfloat16, the same bits as in `lamb_cpu.c`.

A moving average changes by the fraction ``1 - beta`` per step: 0.001 for the second moment. bfloat16 holds 8
significant bits, so to nearest such a change would always be rounded away, and the average would stand still. Rounded
up or down with the right probability, it moves as it should on average, and errors do not add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lamb.kernels.lazy_bits import write

_MASK = 0xFFFFFFFF


def seed(step: float, position: int) -> int:
    """32 bits that differ between steps and between layers, and are the same in every run and on every replica.

    Args:
        step: of the layer.
        position: of the layer in its optimizer.
    """
    return (int(step) * 0x9E3779B9 + (position + 1) * 0x7FEB352D) & _MASK


def random_bits(like: Tensor, seed: int) -> Tensor:
    """32 random bits per element, as int64 of the shape and strides of ``like``; they follow from place and seed."""
    place = torch.empty_like(like, dtype=torch.int64)
    flat = place.as_strided((place.numel(),), (1,))  # in the order of memory: empty_like is dense
    write(flat, torch.arange(place.numel(), device=like.device))
    bits = (place * 0x9E3779B1 + seed) & _MASK
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _MASK
    return bits ^ (bits >> 15)


def store(target: Tensor, value: Tensor, noise: Tensor) -> Tensor:
    """Writes float32 values to a bfloat16 tensor, rounded up or down by chance; NaN and infinity stay what they are.

    Args:
        target: bfloat16, modified in place.
        value: float32, of the same shape.
        noise: int64, 16 random bits per element.

    Returns:
        What was stored, as float32.
    """
    bits = value.contiguous().view(torch.int32).to(torch.int64) & _MASK
    kept = (bits + torch.where(value.isnan(), 0, noise)) & 0xFFFF0000
    rounded = torch.where(kept >= 1 << 31, kept - (1 << 32), kept).to(torch.int32).view(torch.float32)
    write(target, rounded)
    return rounded
