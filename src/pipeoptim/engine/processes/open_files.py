"""Files that a process has open for writing, cut back to what they held earlier: what is written again is not there twice."""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import suppress

Lengths = dict[int, tuple[int, int, int]]
"""descriptor -> (inode, length, position)"""


def lengths_of_open_files() -> Lengths:
    """Of regular files with a name that are open for writing, but for the standard ones."""
    found: Lengths = {}
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with suppress(OSError):  # the descriptor of the listing itself
            status = os.fstat(descriptor)
            writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            if descriptor > 2 and writes and stat.S_ISREG(status.st_mode) and status.st_nlink:
                found[descriptor] = status.st_ino, status.st_size, os.lseek(descriptor, 0, os.SEEK_CUR)
    return found


def cut_back(lengths: Lengths) -> None:
    """Give the files the length and the position that they had."""
    for descriptor, (inode, length, position) in lengths.items():
        with suppress(OSError):
            status = os.fstat(descriptor)
            if status.st_ino == inode and status.st_size > length:
                os.ftruncate(descriptor, length)
                os.lseek(descriptor, position, os.SEEK_SET)
