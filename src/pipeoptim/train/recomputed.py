"""Activation checkpointing without changes to the model: every block keeps only its input and runs again in the backward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(stage: nn.Module) -> None:
    """Checkpoint the blocks of ``stage``, which can be indexed. Names in its ``state_dict`` do not change.

    A block with BatchNorm stays as it is, since its statistics would count every batch twice.

    Example:
        >>> import torch
        >>> stage = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        >>> checkpoint_blocks(stage)
        >>> stage(torch.ones(1, 2)).grad_fn is not None, list(stage.state_dict())
        (True, ['0.weight', '0.bias'])
    """
    blocks: Any = stage
    for n in range(len(blocks)):
        block: nn.Module = blocks[n]
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in block.modules()):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
