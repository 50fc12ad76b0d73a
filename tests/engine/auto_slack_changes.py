"""What two processes and the emulator train on, where M changes while slack is being chosen."""

import torch
from torch import nn

CHANGE, MINI_BATCHES = 10, 56


def stages():
    torch.manual_seed(0)
    return [nn.Linear(4, 4) for _ in range(2)]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, generator=generator) for _ in range(MINI_BATCHES)]
