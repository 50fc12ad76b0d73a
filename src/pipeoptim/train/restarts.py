"""Starts the processes of a run again by itself when one of them has failed, from the newest checkpoint that is whole and finite::

    attempt 1   0 ......... 100 .... stage 1 killed         every attempt but the first begins at a checkpoint, so that
    attempt 2               100 ......... 200 ... killed    the run ends with the bits of one that was never disturbed
    attempt 3                             200 ........

It gives up when attempts end before the next checkpoint again and again: what fails at the same place will do so once more.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeoptim.errors import StageFailure, counted
from pipeoptim.train.result import RunResult
from pipeoptim.train.rundir import Start
from pipeoptim.train.signals import AbortedError, StopSignals

IN_VAIN = 3
"""Attempts in a row that end before the next checkpoint; after them the run is given up."""

_LONGEST = 60  # seconds between two attempts


def with_restarts(
    most: int,
    begin: Start,
    attempt: Callable[[Start], RunResult],
    resume: Callable[[], Start],
    stop: StopSignals,
    say: Callable[[str], None],
) -> RunResult:
    """What ``attempt`` returns, once it does not fail.

    Args:
        most: restarts at most.
        begin: where the first attempt starts.
        resume: where the next one starts.
        stop: a signal that ends the waiting between two attempts.
        say: is told of every restart.

    Raises:
        StageFailure: the last one, with the reason why there is no other attempt.
        AbortedError: a signal came between two attempts.
    """
    start, in_vain = begin, 0
    for number in range(1, most + 2):
        try:
            return attempt(start)
        except StageFailure as failure:
            if number > most:
                raise StageFailure(f"{failure}, after {counted(most, 'restart')}" if most else str(failure)) from failure
            before, start = start, resume()
            in_vain = 0 if start.step > before.step else in_vain + 1
            if in_vain == IN_VAIN:
                raise StageFailure(
                    f"{failure}; given up, since {IN_VAIN} attempts in a row have ended before the first checkpoint after step {start.step}"
                ) from failure
            say(f"restart {number} of {most}, from step {start.step}: {failure}")
            if stop.wait(min(_LONGEST, 2 ** (in_vain - 1)) if in_vain else 0):
                raise AbortedError(f"{stop.name} came after a failure: {failure}", stop.number) from failure
    raise AssertionError("the last attempt returns or raises")
