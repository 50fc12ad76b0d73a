"""Memory is arranged for images without changing what is in it, and only where it is used."""

from __future__ import annotations

import gc
import mmap

from pipeoptim.engine.processes import image_memory

SMAPS = """\
400000-500000 r-xp 00000000 fe:00 1234                                   /usr/bin/python3
Rss:                1024 kB
Anonymous:             0 kB
600000-e00000 rw-p 00000000 00:00 0                                      [heap]
Size:               8192 kB
Rss:                4096 kB
Anonymous:          4096 kB
AnonHugePages:         0 kB
VmFlags: rd wr mr mw me ac sd
7f0000000000-7f0000800000 rw-p 00000000 00:00 0 
Size:               8192 kB
Anonymous:          4092 kB
7f0001000000-7f0001200000 rw-p 00000000 00:00 0 
Anonymous:          2048 kB
7f0002000000-7f0002200000 rw-p 00000000 fe:00 77                         /usr/lib/libtorch.so
Anonymous:          2048 kB
7f0003000000-7f0003200000 rw-s 00000000 00:01 99                         /dev/shm/shared
Anonymous:          2048 kB
7f0004000000-7f0004200000 rw-p 00000000 00:00 0                          [stack]
Anonymous:          2048 kB
"""  # noqa: W291


def test_areas_without_a_file_of_which_half_is_used() -> None:
    assert image_memory._filled_areas(SMAPS) == [(0x600000, 0xE00000), (0x7F0001000000, 0x7F0001200000)]


def test_memory_has_the_same_contents_afterwards(monkeypatch) -> None:
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(range(256)) * (1 << 15)
        found, read = [], image_memory._filled_areas
        # Of all areas only those, so that the test is quick.
        monkeypatch.setattr(image_memory, "_filled_areas", lambda smaps: found.extend(read(smaps)) or found[-1:])
        frozen = gc.get_freeze_count()
        image_memory.prepare_for_images()
        assert gc.get_freeze_count() > frozen
        gc.unfreeze()
        assert memory[:] == bytes(range(256)) * (1 << 15)
        assert sum(end - start for start, end in found) >= 8 << 20
