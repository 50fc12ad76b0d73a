"""Signals that ask a run to stop and save: Ctrl-C, and those that schedulers send before they take the machine away.

A handler only notes the wish; what the loop makes of it is in :mod:`~pipeoptim.train.stopping`. A second Ctrl-C aborts. The other signals
may come any number of times, since launchers and schedulers both send them to every process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from pipeoptim.errors import PipeOptimError


class AbortedError(PipeOptimError):
    """The run was ended by a signal, without a final checkpoint.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


def exit_code(number: int) -> int:
    """Of a process that a signal has ended, as shells and schedulers count: 130 after SIGINT, 143 after SIGTERM.

    >>> exit_code(signal.SIGTERM)
    143
    """
    return 128 + number


class StopSignals:
    """While entered, SIGINT and ``numbers`` set :attr:`wanted` instead of ending the process.

    A step is never interrupted: a stop that is announced in the middle of one would reach some stages a step later than others. Outside
    the main thread, where Python delivers no signals, nothing is installed.

    Args:
        numbers: of the signals, SIGINT aside.
        grace: seconds from one of them to the end of the process, unless it is saving by then.
        aborts: whether a second SIGINT raises KeyboardInterrupt: in one process of a run only.
        how_to_resume: what to type after a grace time that was too short.

    Attributes:
        number: of the first signal that came; 0 before.
        saving: set while a checkpoint is on its way, which the grace time does not cut off.
        others_save: whether one is, where other processes write it.
    """

    def __init__(
        self, numbers: tuple[int, ...], grace: float, aborts: bool = True, how_to_resume: Callable[[], str] = lambda: ""
    ) -> None:
        self.numbers, self.grace, self.aborts, self.how_to_resume = numbers, grace, aborts, how_to_resume
        self.number, self.saving = 0, False
        self.others_save: Callable[[], bool] = lambda: False
        self._deadline = 0.0
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    @property
    def wanted(self) -> bool:
        """Whether a signal has come."""
        return self.number > 0

    @property
    def name(self) -> str:
        """Of the signal that came first; empty before."""
        return signal.Signals(self.number).name if self.number else ""

    @property
    def remaining(self) -> float:
        """Seconds of the grace time that are left."""
        return self._deadline - time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *self.numbers):
                self._before[number] = signal.signal(number, self._on_signal)
            threading.Thread(target=self._watch, name="pipeoptim-grace", daemon=True).start()
        return self

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until a signal has come; whether one has."""
        until = time.monotonic() + seconds
        while not self.wanted and time.monotonic() < until:
            time.sleep(0.05)
        return self.wanted

    def hear(self, number: int) -> None:
        """Of a signal that came to another process of the run: as if it had come here, but it is never a second one."""
        if not self.wanted and number in (signal.SIGINT, *self.numbers):
            self._on_signal(number, None)

    def ignore_from_now(self) -> None:
        """The work is done: signals that come before the process has ended mean nothing, and shall not end it."""
        self._over.set()
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
            self._before[number] = signal.SIG_IGN

    def leave_to_others(self) -> None:
        """From here on other processes, which are told of the signals, watch the grace time."""
        self._over.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and (self.aborts if number == signal.SIGINT else self.number == signal.SIGINT):
            raise KeyboardInterrupt  # Ctrl-C twice; the agent, which got them, ends its workers with SIGTERM
        if not self.wanted:
            self._deadline = time.monotonic() + self.grace
            self.number = number

    def _watch(self) -> None:
        """In a thread, since a process that waits in C++ runs no handler that could raise."""
        # Looks now and then instead of being woken: waking takes a lock, which a handler must not wait for.
        while not self._over.wait(0.2):
            if self.number in self.numbers and self.remaining < 0:
                self._tell_late()
                return

    def _tell_late(self) -> None:
        if self.saving or self.others_save():
            print(f"pipeoptim: saving takes longer than the grace time of {self.grace:g} s after {self.name}", file=sys.stderr)
            return
        late = f"no checkpoint could be reached within the grace time of {self.grace:g} s after {self.name}"
        how = self.how_to_resume()
        print(f"pipeoptim: {late}{how and '; resume from the newest one with: '}{how}", file=sys.stderr, flush=True)
        os._exit(exit_code(self.number))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
