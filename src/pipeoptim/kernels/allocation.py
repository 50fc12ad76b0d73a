"""Pages of memory: copies of weights in huge ones, since they are walked from end to end, where small pages cost a few per cent; and
what is freed kept, since the system must find and clear every new page."""

from __future__ import annotations

import ctypes
import mmap
import os
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


def keep_freed_memory() -> None:
    """Keep what this process frees for its next mini-batch, where glibc would give it back to the system, page by page.

    For processes of our own that measure or train; it is for the whole process, and for good. Nothing happens where the C library
    is another one or the environment has settings for it (``MALLOC_...``, ``GLIBC_TUNABLES``).

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    chosen = any((name.startswith("MALLOC_") and name.endswith("_")) or name == "GLIBC_TUNABLES" for name in os.environ)
    if mallopt is not None and not chosen:
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_MMAP_MAX, 0)  # a large tensor is in no mapping of its own, which would end with it


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
