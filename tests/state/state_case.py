"""One small model with everything that a checkpoint must hold, cut into any number of stages."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn


def model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout)) for _ in range(7)]
    return nn.Sequential(*blocks, nn.Linear(8, 3))


def cut(depth: int, dropout: float = 0.0) -> list[nn.Module]:
    whole = model(dropout)
    ends = [round(k * len(whole) / depth) for k in range(depth + 1)]
    return [whole[a:b] for a, b in pairwise(ends)]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
}


def schedule(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def batch(step: int):
    g = torch.Generator().manual_seed(step)
    x = torch.randn(16, 8, generator=g)
    return x, (x[:, :3] + x[:, 3:6]).argmax(1)
