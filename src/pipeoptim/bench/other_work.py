"""Whether other work on the machine took part in a measurement: cores that were busy beside this process and its children."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

STAT = Path("/proc/stat")


class OtherWork:
    """Counts while it is entered; processes that were started within must have ended within.

    Attributes:
        cores: processor seconds per second of all other processes, and of other guests of the same host; 0 where the system does not tell.

    Example:
        >>> with OtherWork() as other:
        ...     found = sum(range(1000))
        >>> other.cores >= 0
        True

    Source: proc_stat(5).
    """

    cores = 0.0

    def __enter__(self) -> OtherWork:
        self._began = perf_counter(), _others()
        return self

    def __exit__(self, *_: object) -> None:
        began, before = self._began
        self.cores = max(0.0, _others() - before) / max(perf_counter() - began, 1e-9)


def _others() -> float:
    """Processor seconds so far of everybody but this process and its children."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - (own.user + own.system + own.children_user + own.children_system)
