"""What the processes that connect anew run."""

from dataclasses import dataclass, field

import torch
from torch import nn

import pipeoptim as po

SAVED = 4  # mini-batches before the boundary that is loaded again


@dataclass(frozen=True)
class Run:
    method: str = "pipeoptim"
    m: int = 1
    optimizer: str = "adamw"
    clip: po.Clip | None = None
    transport: str = "auto"
    tied: list = field(default_factory=list)
    chunks: int = 1  # stages per process


RUNS = [
    Run(),
    Run("pipedream", 2, "sgd", po.Clip(0.1, "global"), transport="group"),
    Run("pipeoptim_stash", 4, clip=po.Clip(0.1, "global_delayed")),
    Run("naive", 2, "sgd", tied=[[(0, "stage.0.weight"), (2, "stage.0.weight")]]),
    Run(m=2, chunks=2),
]


def breaks(run):
    """What is in progress when a process gives up, and which forward of its stage then fails, after 4 mini-batches at most."""
    return {"nothing": -1, "step": 3, "evaluation": 4 * run.m + 2}


def stage():
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh())


def batches():
    g = torch.Generator().manual_seed(1)
    for _ in range(9):
        yield torch.randn(8, 6, generator=g)
