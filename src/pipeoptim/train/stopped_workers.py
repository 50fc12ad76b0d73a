"""A worker that is stopped (SIGSTOP, a debugger) ends with the others: it takes no SIGTERM before it runs again.

torch's agent sends SIGTERM to all workers when one has failed, and SIGKILL after 30 seconds. A stopped worker would be waited for all
that time, and its end by SIGKILL would then look like the first cause.
"""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from pipeoptim.train.process_state import process_state
from pipeoptim.train.repeated_looks import repeatedly

_LOOK = 0.5  # seconds between looks


def stopped_workers_end() -> AbstractContextManager[None]:
    """While inside, stopped children of this process are continued as soon as another child has ended. Linux only."""
    most = 0

    def look() -> None:
        nonlocal most
        states = {pid: process_state(pid) for pid in _children()}
        alive = [pid for pid, state in states.items() if state not in ("", "Z", "X")]
        if len(alive) < most:
            for pid in (pid for pid in alive if states[pid] in "Tt"):
                with suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        most = max(most, len(alive))

    return repeatedly(look, _LOOK, "stopped-workers")


def _children() -> list[int]:
    """Of all threads of this process."""
    found = list[int]()
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found
