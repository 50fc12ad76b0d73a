"""Memory of a process that is forked every so many mini-batches, arranged so that forks and what is written after them are cheap.

A fork copies an entry for each page of 4 KiB; most pages hold modules and libraries, which are never written again. Huge pages have one
entry per 2 MiB. And the garbage collector writes into each object that it looks at, which would copy its page for every image.
Saved: 5 of 9 ms of processor time per image of a process with 240 MiB (``benchmarks/survive_cost.py``). It takes 0.5 s, once.
"""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

_HUGE = 1 << 21
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1; others refuse it
_AREA = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0 *(?:\[heap\])?\n(?:\w+: .*\n)*?Anonymous: +(\d+) kB$", re.MULTILINE
)


def prepare_for_images() -> None:
    """Call it once, when all is set up. Does nothing where the system cannot."""
    gc.collect()
    gc.freeze()
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        for start, end in _filled_areas(Path("/proc/self/smaps").read_text()):
            for place in range(-(-start // _HUGE) * _HUGE, end - _HUGE + 1, _HUGE):
                madvise(ctypes.c_void_p(place), ctypes.c_size_t(_HUGE), _COLLAPSE)  # advice: it may fail


def _filled_areas(smaps: str) -> list[tuple[int, int]]:
    """The heap and other private memory without a file, as far as half of it is used: huge pages would fill the rest."""
    areas = [(int(start, 16), int(end, 16), 1024 * int(used)) for start, end, used in _AREA.findall(smaps)]
    return [(start, end) for start, end, used in areas if 2 * used >= end - start]
