"""What passes between stages: nested tensors, None and plain values, cut from the graph, copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


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
