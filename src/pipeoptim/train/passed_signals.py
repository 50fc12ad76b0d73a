"""Passes the signals that ask a run to stop on from the launcher to the workers, each to each worker once.

torch's agent could do it, but would take a second signal, which schedulers send, for the wish to abort; and it kills a worker whose
handlers are not installed yet. So a worker is told when it has said in its log that it listens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from pipeoptim.train.repeated_looks import repeatedly
from pipeoptim.train.signals import StopSignals

_LOOK = 0.1  # seconds between looks


def listening(rank: str | None) -> str:
    """What a worker says when its handlers are installed."""
    return f"rank {rank}: process {os.getpid()}"


def passed_on(stop: StopSignals, logs: Iterable[str]) -> AbstractContextManager[None]:
    """While inside, what comes to ``stop`` goes on to the workers that write these ``logs``."""
    stop.leave_to_others()
    return repeatedly(partial(_tell, stop, set(logs)), _LOOK, "passed-signals")


def _tell(stop: StopSignals, untold: set[str]) -> None:
    for log in sorted(untold) if stop.number in stop.numbers else ():
        with suppress(OSError):  # it has not begun, or has ended
            said = re.search(r"^rank \d+: process (\d+)$", Path(log).read_text(errors="replace"), re.MULTILINE)
            if said is not None:
                untold.discard(log)
                os.kill(int(said[1]), stop.number)
