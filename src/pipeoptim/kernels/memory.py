"""Which tensors a kernel can take: float32 on the CPU, and several of them in the same order in memory."""

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
    shape = first.shape
    if not all(t.dtype is torch.float32 and t.is_cpu and type(t) in _PLAIN and t.layout is torch.strided for t in tensors):
        return False
    if any(t.shape != shape or t.is_neg() for t in tensors):
        return False
    if all(t.is_contiguous() for t in tensors):
        return True
    return _dense(first) and all(t.stride() == first.stride() for t in tensors)


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
