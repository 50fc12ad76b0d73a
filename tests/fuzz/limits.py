"""Bounds in time and memory for what is drawn at random, and how much of it is drawn."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_SECONDS = 10.0
"""Processor time that a command line or a call may take: other processes may have the cores meanwhile."""

MEMORY = 8 << 30
"""Bytes that may be asked for beyond what the process has: a huge number must not take the machine along."""


class TooSlowError(BaseException):
    """Not an Exception, so that nothing on the way takes it for one of its own."""


def amount(usual: int) -> int:
    """How many to draw: PIPEOPTIM_FUZZ=10 makes it ten times as many."""
    return int(usual * float(os.environ.get("PIPEOPTIM_FUZZ", "1")))


def seed() -> int:
    """PIPEOPTIM_FUZZ_SEED, for other draws than the usual ones."""
    return int(os.environ.get("PIPEOPTIM_FUZZ_SEED", "0"))


@contextmanager
def bounded() -> Iterator[None]:
    """TooSlowError where the block needs more than its time; MemoryError where it asks for far too much memory."""

    def stop(*_: object) -> None:
        raise TooSlowError

    before, most = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGVTALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, most))
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    start = time.process_time()
    try:
        yield
        if time.process_time() - start > MOST_SECONDS:  # inside one call of C, where no signal is handled
            raise TooSlowError
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, most))
