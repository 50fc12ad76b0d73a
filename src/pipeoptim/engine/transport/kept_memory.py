"""Memory of large messages that are kept: written once, read by the neighbour through a descriptor, used again when forgotten.

It is shared, so that forks copy none of it. In private memory the log would wander through the heap between two images, and the first
write after a fork copies each page, even of memory that was free::

    private   | log of the last period | free: copied page by page when the next period is written ...
    shared    | log of the last period | free: written where it is; after two periods no page is new
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

_SLOTS = 32  # of one file, which takes two descriptors; what no message has reached takes no memory


class KeptFile:
    """A file in memory, mapped; it ends with the last that refers to it, in this process or another."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("pipeoptim-kept")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        self.block = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)


class KeptSlot(NamedTuple):
    """Room for one message: ``block`` is what lies at ``offset`` in ``file``."""

    file: KeptFile
    offset: int
    block: Tensor


class KeptMemory:
    """Slots of ``size`` bytes, as many as are needed at a time."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._free: list[KeptSlot] = []

    def take(self) -> KeptSlot:
        """A slot from which nobody reads."""
        if not self._free:
            file = KeptFile(_SLOTS * self.size)
            offsets = range(0, _SLOTS * self.size, self.size)
            self._free.extend(KeptSlot(file, offset, file.block[offset : offset + self.size]) for offset in offsets)
        return self._free.pop()  # the one given back last, which caches may still have

    def give_back(self, slot: KeptSlot) -> None:
        """It was read, and nobody will ask for it again. One of another size ends here."""
        if slot.block.numel() == self.size:
            self._free.append(slot)
