"""A worker ends with the process that started it, however that one ends: killed outright, or before the worker had begun."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER = "PIPEOPTIM_LAUNCHER"
"""Environment variable with the process id of who starts a worker. The worker cannot ask: if that process has died meanwhile, its
parent is another one already."""

SUPERVISED = "PIPEOPTIM_SUPERVISED"
"""Environment variable of a worker that its launcher replaces when it dies."""

_PR_SET_PDEATHSIG = 1


def is_supervised() -> bool:
    """Whether this process is replaced when it dies."""
    return SUPERVISED in os.environ


def end_with_parent() -> None:
    """Have this process killed when its parent dies. On Linux by the kernel; elsewhere by a look once a second."""
    parent = int(os.environ.get(LAUNCHER) or os.getppid())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew what to do then
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.platform != "linux":
        threading.Thread(target=_watch, args=(parent,), name="pipeoptim-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
