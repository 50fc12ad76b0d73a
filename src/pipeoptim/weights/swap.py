"""Put other weights into a module for the time of a ``with`` block, and always take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def swapped(params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> Iterator[None]:
    """Let ``params`` hold the values of ``tensors`` inside the block, without a copy.

    Only the pointer to the data changes: the parameters stay the same objects, so gradients arrive where the optimizer
    looks for them. The old pointers come back also when the block raises.

    Args:
        params: parameters of a module.
        tensors: same shapes, strides, types and devices; None leaves the parameters as they are.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> with swapped([p], [torch.ones(2)]):
        ...     print(p.sum().item())
        2.0
        >>> p.sum().item()
        0.0
    """
    if tensors is None:
        yield
        return
    originals = [p.data for p in params]
    try:
        for p, tensor in zip(params, tensors, strict=True):
            p.data = tensor
        yield
    finally:
        for p, original in zip(params, originals, strict=True):
            p.data = original
