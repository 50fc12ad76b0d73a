"""Ctrl-C: the first one asks for a clean stop, the second one aborts."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pipeoptim.errors import PipeOptimError


class AbortedError(PipeOptimError):
    """The run was aborted by a signal, without a final checkpoint."""


class StopOnInterrupt:
    """While entered, the first SIGINT sets ``wanted``; the second one raises KeyboardInterrupt.

    The flag is only read between two steps: a stop that is announced in the middle of one would reach some stages a step
    later than others. Outside the main thread, where Python delivers no signals, nothing is installed.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
