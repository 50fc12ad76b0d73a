"""``slack="auto"``: how much slack the links of this run need, from what the first mini-batches measured.

A message over boundary b and one back take the round trip r_b, and stage times vary by a standard deviation of sigma. They hold
nobody up where the slack of the boundary is worth as much: ``x_b = ceil((r_b + 2 sigma) / T)``, T the time of the slowest stage per
micro-batch. What is less than a twentieth of T counts as nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from pipeoptim.schedule import Slack

MOST = 32
"""On a boundary: a round trip of so many stage times is no link to train over."""

_NEGLIGIBLE = 0.05


class StageMeasurement(NamedTuple):
    """What one stage has measured, in seconds.

    Attributes:
        computing, spread: per micro-batch, and its standard deviation.
        from_previous, from_next: the shortest time that a message took, by the clock of the sender and this stage's, which may be of
            two machines; 0 where there is no neighbour.
    """

    computing: float
    spread: float
    from_previous: float
    from_next: float


def choose_slack(measured: Sequence[StageMeasurement], interleaved: bool) -> Slack:
    """The slack of every boundary; a single number where stages share processes. The same for the same measurements.

    Example:
        >>> near = [StageMeasurement(0.01, 0.0, 0.0, 0.0001), StageMeasurement(0.01, 0.0001, 0.0001, 0.0)]
        >>> far = [StageMeasurement(0.01, 0.0, 0.0, 5.006), StageMeasurement(0.01, 0.0, -4.994, 0.0)]  # clocks that are 5 s apart
        >>> choose_slack(near, False), choose_slack(far, False)
        ((0.0,), (2.0,))
    """
    slowest = max(one.computing for one in measured)
    varies = 2 * max(one.spread for one in measured)
    # What the two clocks differ by is in both directions, with opposite signs.
    trips = [here.from_next + there.from_previous for here, there in pairwise(measured)]
    found = tuple(float(min(MOST, max(0, ceil((trip + varies) / slowest - _NEGLIGIBLE)))) for trip in trips)
    return max(found, default=0.0) if interleaved else found
