"""What passes between stages: nested tensors, None and plain values, split in micro-batches, cut from the graph, copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pipeoptim.errors import ConfigError


def split(tree: Any, m: int, what: str) -> list[Any]:
    """``m`` equal slices of every tensor in ``tree`` along dimension 0; other values are repeated.

    Raises:
        ConfigError: a tensor has no dimension 0, or its length is not a multiple of ``m``.
    """
    if m == 1:
        return [tree]
    leaves, spec = tree_flatten(tree)
    columns = [_slices(leaf, m, what) if isinstance(leaf, Tensor) else [leaf] * m for leaf in leaves]
    return [tree_unflatten([column[i] for column in columns], spec) for i in range(m)]


def _slices(tensor: Tensor, m: int, what: str) -> list[Tensor]:
    if tensor.dim() == 0:
        raise ConfigError(f"a tensor in {what} has no batch dimension; it cannot be split into {m} micro-batches")
    if tensor.shape[0] % m:
        raise ConfigError(
            f"the batch of {tensor.shape[0]} in {what} cannot be split into {m} equal micro-batches; "
            f"use a batch size that is a multiple of {m}, or other microbatches"
        )
    return list(tensor.chunk(m)) if tensor.shape[0] else [tensor] * m


def as_args(output: Any) -> tuple[Any, ...]:
    """A stage's output as the positional arguments of the next stage: a tuple (or list) is spread, else one argument."""
    return tuple(output) if isinstance(output, (tuple, list)) and not hasattr(output, "_fields") else (output,)


def portable(tensor: Tensor) -> Tensor:
    """``tensor`` in a layout that travels: itself where it is contiguous or channels-last, else a contiguous copy."""
    if tensor.is_contiguous():
        return tensor
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return tensor
    return tensor.contiguous()


def transferred(tree: Any) -> Any:
    """What the next stage gets of ``tree`` when both live in one process: a copy, cut from the graph, as a transfer makes."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = portable(value.detach()).clone()
        return copy.requires_grad_(value.requires_grad)

    return tree_map(leaf, tree)


def differentiable(tree: Any) -> list[Tensor]:
    """The tensors of ``tree`` that a gradient can flow through, in a fixed order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.requires_grad]
