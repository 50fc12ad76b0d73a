"""How long each stage computes and waits, measured all the time: two or three looks at a clock per action, a microsecond in all.

Times are those of the program: a device that computes by itself, as a GPU does, is not waited for, and its stage shows the time in which
work is handed to it. Waits for norms or for gradients of replicas count as computing.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from time import perf_counter
from typing import NamedTuple

WINDOW = 32
"""Mini-batches that a figure is the median of: a pause of the machine, a validation or a checkpoint among them does not show."""


class StageTimes(NamedTuple):
    """What one stage did per mini-batch, lately, in seconds; medians over the last mini-batches.

    Attributes:
        stage: k.
        computing: F, B and U, with predictions and the sending of messages.
        waiting: for activations and gradients.
        period: from the beginning of one mini-batch to the next, with whatever the script does between them.
        spread: of ``computing``, as a standard deviation, without the longest and shortest ones.
        slowed: ``computing`` over what it was at first; above 1 where the stage has become slower.
        held_up: ``period`` over what it was at first.
        late_activations, late_gradients: from the sending of a message to its end here, the least of the last 64 to 128: the delay of the
            link from the previous and from the next stage, and more where the stage is never the one that waits. Between machines whose
            clocks differ, the mean of a boundary's both directions is right. 0 where nothing is measured: in one process, without such a
            neighbour, and with ``survive``.
    """

    stage: int
    computing: float
    waiting: float
    period: float
    spread: float
    slowed: float
    held_up: float
    late_activations: float = 0.0
    late_gradients: float = 0.0


class StageClock:
    """The clock of one stage. A runner adds to ``computed`` and ``waited``; the pipeline ends mini-batches.

    Example:
        >>> clock = StageClock()
        >>> for n in range(2 * WINDOW + 2):
        ...     clock.computed, clock.waited = 0.25 if n > WINDOW + 1 else 0.125, 0.125
        ...     clock.end_mini_batch(float(n))
        >>> clock.times(0)[:7]
        (0, 0.25, 0.125, 1.0, 0.0, 2.0, 1.0)
    """

    __slots__ = ("_ended", "_first", "_last", "_seen", "computed", "waited")

    def __init__(self) -> None:
        self.computed = self.waited = 0.0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was measured: mini-batches have another size, or are cut another way, from here on."""
        self._last: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._first: tuple[float, float] | None = None  # computing and period at first
        self._seen = -2  # the first two mini-batches find caches and allocators cold
        self._ended = 0.0

    def end_mini_batch(self, now: float) -> None:
        """The actions of a step are done."""
        self._seen += 1
        if self._seen > 0:
            self._last.append((self.computed, self.waited, now - self._ended))
            if self._seen == WINDOW:
                self._first = self._median(0), self._median(2)
        self.computed = self.waited = 0.0
        self._ended = now

    def times(self, k: int) -> StageTimes | None:
        """The figures of stage ``k``; None while there are too few mini-batches."""
        if self._first is None:
            return None
        computing, waiting, period = map(self._median, range(3))
        first, period_first = self._first
        return StageTimes(k, computing, waiting, period, self._spread(), computing / first, period / period_first)

    def _median(self, column: int) -> float:
        return median(row[column] for row in self._last)

    def _spread(self) -> float:
        """Half the distance between the quantiles that hold the middle 68 %: the standard deviation, were it not for single pauses."""
        ordered = sorted(row[0] for row in self._last)
        return (ordered[round(0.84 * (len(ordered) - 1))] - ordered[round(0.16 * (len(ordered) - 1))]) / 2


now = perf_counter
