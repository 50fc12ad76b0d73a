"""Where processes listen for connections, read from /proc."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def addresses(pid: int | str = "self") -> set[str]:
    """The addresses at which the process listens on TCP."""
    sockets = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found = set()
    for table, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])  # each word of four bytes in the machine's order
                packed = b"".join(words[n : n + 4][::-1] for n in range(0, size, 4))
                found.add(socket.inet_ntop(family, packed))
    return found


def descendants(pid: int) -> list[int]:
    """The process and those that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


def of_a_benchmark() -> list[str]:
    """For ``run_on_processes``: what this process listens at, with a group of its own."""
    import torch.distributed as dist

    group = dist.new_group()
    dist.barrier(group=group)
    return sorted(addresses())
