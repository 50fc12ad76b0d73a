"""The models that benchmarks run on: a builder returns flat blocks, an input batch, a target batch and a loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeoptim.engine.stage import LossFn


class Work(NamedTuple):
    """What is trained: blocks to cut into stages, one mini-batch to feed again and again, and the loss."""

    blocks: list[nn.Module]
    x: Tensor
    y: Tensor
    loss_fn: LossFn


def mlp(batch: int, width: int = 512, layers: int = 8) -> Work:
    """``layers`` of Linear(width, width) and ReLU."""
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
    return Work(blocks, torch.randn(batch, width), torch.randn(batch, width), nn.functional.mse_loss)


MODELS = {"mlp": mlp}
