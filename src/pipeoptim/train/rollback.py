"""Goes back to the newest checkpoint when a mini-batch was bad, and passes over it: ``--on-bad rollback``.

::

    0 ......... 100 ......... 137 bad       the number is written down by the process that has found it, and training ends
                100 ......... 137 ......... all stages alike leave its update out, as on_bad="skip" does
                               '--- trained again, with the same bits, up to here

So the run ends with the bits of one that knew from the beginning which mini-batches to leave out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from pipeoptim.errors import DivergedError, StageFailure
from pipeoptim.train.result import RunResult
from pipeoptim.train.rundir import RunDir, Start

MOST = 10
"""Times that a run goes back to the same step; with the next one it ends, since nothing is learnt any more."""


def with_rollbacks(
    run: RunDir, attempt: Callable[[Start], RunResult], resume: Callable[[], Start], say: Callable[[str], None]
) -> Callable[[Start], RunResult]:
    """``attempt``, which begins again behind each mini-batch that it has found bad.

    Args:
        run: where processes leave the numbers of these.
        resume: where the next attempt starts.
        say: is told of every rollback.
    """
    times: Counter[int] = Counter()

    def attempts(start: Start) -> RunResult:
        while True:
            known = run.left_out()
            try:
                return attempt(start)
            except (StageFailure, DivergedError) as error:
                found = sorted(run.left_out().items() - known.items())
                if not found:
                    raise
                start = resume()
                times[start.step] += 1
                if times[start.step] > MOST:
                    raise DivergedError(
                        f"{error}; given up, since it has gone back to step {start.step} {MOST} times already; look at the mini-batches in "
                        f"{run.bad}, or lower --lr"
                    ) from error
                for n, reason in found:
                    say(f"back to step {start.step}, to leave out mini-batch {n} (counted from 0): {reason}")

    return attempts


__all__ = ["MOST", "with_rollbacks"]
