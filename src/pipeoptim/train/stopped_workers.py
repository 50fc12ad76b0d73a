"""A worker that is stopped (SIGSTOP, a debugger) ends with the others: it takes no SIGTERM before it runs again.

torch's agent sends SIGTERM to all workers when one has failed, and SIGKILL after 30 seconds. A stopped worker would be waited for all
that time, and its end by SIGKILL would then look like the first cause.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOOK = 0.5  # seconds between looks


@contextmanager
def stopped_workers_end() -> Iterator[None]:
    """While inside, stopped children of this process are continued as soon as another child has ended. Linux only."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over,), name="pipeoptim-stopped-workers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(over: threading.Event) -> None:
    most = 0
    while not over.wait(_LOOK):
        states = _children()
        alive = [pid for pid, state in states.items() if state not in "ZX"]
        if len(alive) < most:
            for pid in (pid for pid in alive if states[pid] in "Tt"):
                with suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        most = max(most, len(alive))


def _children() -> dict[int, str]:
    """Process id -> state, as /proc has it, of the children of all threads of this process."""
    found = {}
    with suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            for pid in (thread / "children").read_text().split():
                with suppress(OSError):  # it has ended meanwhile
                    found[int(pid)] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return found
