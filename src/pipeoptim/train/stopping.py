"""Where a run that is asked to stop does so, such that the resumed run equals one that was never stopped::

    mini-batch      ...  397  398  399  400  401  ...          checkpoint_every = 200
                          ^ signal      ^ a checkpoint is due: all drain here, stopped or not

A pipeline that never flushes has mini-batches in flight between two steps, and to drain it at a step where an undisturbed run does not
would change what is trained. So the run goes on to the next checkpoint if that comes within the grace time. Where it does not, or where
the method flushes after every mini-batch anyway, it stops after the next mini-batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from pipeoptim.config import TrainConfig
from pipeoptim.train.signals import StopSignals

_MARGIN = 1.2  # of the estimated time to the next checkpoint: mini-batches do not all take equally long


class StopPlan:
    """When the wish to stop becomes a stop.

    Args:
        config: of the run.
        flushes: whether the pipeline is empty after every mini-batch.
        stop: the wish of this process.
        gather: the value of every process, on every process.
    """

    def __init__(self, config: TrainConfig, flushes: bool, stop: StopSignals, gather: Callable[[Any], list[Any]]) -> None:
        self.config, self.flushes, self.stop, self._gather = config, flushes, stop, gather
        self.reason = ""  # of a callback that has ended the run, likewise; before, where the callback is
        self.signal = ""  # the name of the one that stopped the run, once all processes know of it
        self._seconds: deque[float] = deque(maxlen=20)  # of the last mini-batches
        self._save_seconds = 0.0

    def note_step(self, seconds: float) -> None:
        """A mini-batch took so long."""
        self._seconds.append(seconds)

    def note_save(self, seconds: float) -> None:
        """A checkpoint took so long, its drain and validation included."""
        self._save_seconds = seconds

    def agreed(self) -> bool:
        """Whether any process was asked to stop; at the beginning and after a checkpoint, when nothing is lost by it. Called by all."""
        found = self._gather([self.stop.name, self.reason])
        self.signal, self.reason = (next(filter(None, asked), "") for asked in zip(*found, strict=True))
        return bool(self.signal or self.reason)

    def next_checkpoint(self, done: int) -> int:
        """The first step after ``done`` mini-batches at which an undisturbed run saves."""
        every, steps = self.config.checkpoint_every, self.config.steps
        return min(steps, (done // every + 1) * every) if every else steps

    def at_once(self, done: int) -> bool:
        """Before the mini-batch after ``done``: whether it is to be the last."""
        if not self.stop.wanted:
            return False
        left = self.next_checkpoint(done) - done
        if self.flushes or left == 1:
            return self.flushes
        each = sum(self._seconds) / max(1, len(self._seconds))
        return _MARGIN * left * each + self._save_seconds > self.stop.remaining

    def is_exact(self, done: int) -> bool:
        """Whether a run that stops after ``done`` mini-batches goes on as one that was not stopped, bit for bit."""
        return self.flushes or self.next_checkpoint(done - 1) == done
