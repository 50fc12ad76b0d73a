"""Which tensors a kernel can take: of a type and on a device that it knows, and several of them in the same order in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def flat(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel may walk over all of them with one index.

    They are plain float32 tensors on the CPU, of one shape, and each fills its part of memory with its dimensions in the
    same order.
    """
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    same = True  # one after the other, in a plain loop: this is asked for every tensor in every update
    for t in tensors:
        if type(t) not in _PLAIN or t.dtype is not torch.float32 or not t.is_cpu or t.layout is not torch.strided:
            return False
        if t.shape != shape or t.is_neg():
            return False
        same = same and t.stride() == stride
    return _walked(tensors, same)


def in_step(tensors: Sequence[Tensor]) -> bool:
    """As `flat`, for any types and devices."""
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    plain = all(type(t) in _PLAIN and t.layout is torch.strided and not t.is_neg() and t.shape == shape for t in tensors)
    return plain and _walked(tensors, all(t.stride() == stride for t in tensors))


def _walked(tensors: Sequence[Tensor], same: bool) -> bool:
    """Whether one index goes over all of them; `same`: they have the same strides."""
    first = tensors[0]
    return (same and (first.is_contiguous() or _dense(first))) or all(t.is_contiguous() for t in tensors)


def _dense(tensor: Tensor) -> bool:
    """No gaps and no overlaps, as in channels_last or a transpose."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != reach:
            return False
        reach *= size
    return True
