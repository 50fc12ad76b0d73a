"""One clock for all stages. Processes of one machine share a clock; between machines, messages tell how the clocks differ.

A message is never taken before it was sent. Of the messages one way, the fastest took at least ``d + x``, of those the other
way at least ``d - x``, where x is how much the second clock is ahead and d how long a fast message takes; half of the
difference is x (this is how NTP sets clocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pipeoptim.telemetry.trace.read import StageTrace


def align(stages: Sequence[StageTrace]) -> list[StageTrace]:
    """The same stages on the clock of stage 0, which begins with the first thing that any of them did."""
    shifts = {stages[0].clock: 0}
    for before, after in pairwise(stages):
        # Stage by stage along the pipeline: only neighbours exchange messages.
        if after.clock not in shifts:
            shifts[after.clock] = shifts[before.clock] - ahead(before, after)
    moved = [s.shifted(shifts[s.clock]) for s in stages]
    zero = min((span.begin for s in moved for span in s.spans), default=0)
    return [s.shifted(-zero) for s in moved]


def ahead(one: StageTrace, other: StageTrace) -> int:
    """Nanoseconds that the clock of ``other`` is ahead of that of its neighbour ``one``."""
    there, back = _fastest(one, other), _fastest(other, one)
    if there is not None and back is not None:
        return (there - back) // 2
    if there is not None or back is not None:  # messages one way only: they took no time at best
        return there if there is not None else -(back or 0)
    begins = [min((span.begin for span in s.spans), default=0) for s in (one, other)]
    return begins[1] - begins[0]


def _fastest(sender: StageTrace, receiver: StageTrace) -> int | None:
    """Least time from sending to taking a message, each on its own clock."""
    sent = {s.number: s.begin for s in sender.spans if s.what == "send" and s.peer == receiver.stage}
    taken = [s for s in receiver.spans if s.what == "receive" and s.peer == sender.stage and s.number in sent]
    return min((s.end - sent[s.number] for s in taken), default=None)
