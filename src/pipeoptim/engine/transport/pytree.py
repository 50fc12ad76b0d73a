"""What passes between stages: nested tensors, None and plain values; how they are cut from the graph and copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pipeoptim.errors import ConfigError


def as_args(output: Any) -> tuple[Any, ...]:
    """A stage's output as the positional arguments of the next stage: a tuple (or list) is spread, else one argument."""
    return tuple(output) if isinstance(output, (tuple, list)) and not hasattr(output, "_fields") else (output,)


PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types besides tensors that pass between stages."""


def check_leaf(value: Any) -> None:
    """Raises ConfigError for a leaf of a stage's output that cannot pass to the next stage."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_nested and not value.is_quantized and not value.is_meta:
            return
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "meta" if value.is_meta else "sparse"
        raise ConfigError(
            f"a stage returned a {kind} tensor, which cannot be sent to the next stage; return dense tensors with data"
        )
    if type(value) not in PLAIN:  # a subclass would lose its class on the way to another process
        raise ConfigError(
            f"a stage returned a {type(value).__name__}, which cannot be sent to the next stage; return tensors, None, Python's own "
            "numbers and strings, and types of torch, in tuples, lists, dicts, or classes registered with torch.utils._pytree"
        )


def portable(tensor: Tensor) -> Tensor:
    """``tensor`` in a layout that can be sent: itself where it is contiguous or channels-last, else a contiguous copy."""
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
        check_leaf(value)
        if not isinstance(value, Tensor):
            return value
        copy = portable(value.detach()).clone()
        return copy.requires_grad_(value.requires_grad)

    return tree_map(leaf, tree)


def differentiable(tree: Any) -> list[Tensor]:
    """The tensors of ``tree`` that a gradient can flow through, in a fixed order."""
    flat = type(tree) in (tuple, list) and all(isinstance(leaf, Tensor) for leaf in tree)  # the usual case, and a fast one
    return [leaf for leaf in (tree if flat else tree_flatten(tree)[0]) if isinstance(leaf, Tensor) and leaf.requires_grad]
