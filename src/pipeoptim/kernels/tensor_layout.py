"""Which tensors a kernel can take: their types and devices are supported, and their elements lie in memory in the same order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def share_flat_index(tensors: Sequence[Tensor]) -> bool:
    """Whether a C kernel may walk over all of them with one flat index.

    They are plain float32 tensors on the CPU, of one shape, without gaps, and with their dimensions in the same order in memory.
    """
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    same = True  # a plain loop rather than all(): this is asked for every tensor whenever a plan is made
    for t in tensors:
        if type(t) not in _PLAIN or t.dtype is not torch.float32 or not t.is_cpu or t.layout is not torch.strided:
            return False
        if t.shape != shape or t.is_neg():
            return False
        same = same and t.stride() == stride
    return _dense_alike(tensors, same)


def share_memory_order(tensors: Sequence[Tensor]) -> bool:
    """As `share_flat_index`, for any types and devices."""
    first = tensors[0]
    shape, stride = first.shape, first.stride()
    plain = all(type(t) in _PLAIN and t.layout is torch.strided and not t.is_neg() and t.shape == shape for t in tensors)
    return plain and _dense_alike(tensors, all(t.stride() == stride for t in tensors))


def _dense_alike(tensors: Sequence[Tensor], same: bool) -> bool:
    """Whether all are dense, in the same order; `same`: they have the same strides."""
    first = tensors[0]
    return (same and (first.is_contiguous() or _dense(first))) or all(t.is_contiguous() for t in tensors)


def _dense(tensor: Tensor) -> bool:
    """No gaps and no overlaps, as in channels_last or a transpose."""
    reach = 1
    # By increasing stride, every dimension must begin where the smaller ones end.
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        # torch gives dimensions of size 1 any stride.
        if size == 1:
            continue
        if stride != reach:
            return False
        reach *= size
    return True
