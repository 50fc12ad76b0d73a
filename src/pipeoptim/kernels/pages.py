"""Memory in huge pages: a copy of a stage's weights is walked from end to end, where small pages cost a few per cent."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE = 1 << 21
WORTH_IT = 4 * HUGE


def empty_like(tensor: Tensor) -> Tensor:
    """As ``torch.empty_like(tensor)`` for a flat tensor; large ones on the CPU ask the system for huge pages."""
    made = torch.empty_like(tensor)
    size = made.numel() * made.element_size()
    if made.is_cpu and size >= WORTH_IT and _madvise() is not None:
        start = -(-made.data_ptr() // HUGE) * HUGE
        length = (made.data_ptr() + size - start) // HUGE * HUGE
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # advice: it may fail
    return made


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
