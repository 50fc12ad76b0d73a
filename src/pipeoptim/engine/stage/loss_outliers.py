"""A loss far above the recent ones: a mini-batch that is large but finite, and would move the weights further than many others together.

::

    losses of the last 64 micro-batches that were trained on  -->  their median, and the median distance from it
    loss > median + outlier * 1.4826 * distance               -->  an outlier

Both are medians, so what was let through before moves them little: a loss of 1e12 among the first ones hides no later one. 1.4826 times
the median distance is the standard deviation where losses are normally distributed.
"""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 64
"""Losses that are remembered."""

LEAST = 16
"""Losses from which on one is judged."""

_SIGMA = 1.4826
_SMALLEST_SPREAD = 0.01  # of the median: losses that hardly differ would make every other one an outlier


class LossOutliers:
    """Tells outliers among the losses of micro-batches. On the last stage.

    Args:
        limit: standard deviations above the median from which on a loss is one.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self._of_mini_batch: list[float] = []

    def judge(self, loss: float) -> str:
        """What is wrong with a finite ``loss``, in words; empty for nothing.

        >>> losses = LossOutliers(6.0)
        >>> losses.losses.extend([2.0, 2.1, 1.9, 2.0] * 4)
        >>> losses.judge(2.3), losses.judge(1e6)
        ('', 'the loss is 1e+06, an outlier: the 16 before it have a median of 2 and a spread of 0.0741, of which 6 are allowed')
        """
        self._of_mini_batch.append(loss)
        if len(self.losses) < LEAST:
            return ""
        middle = median(self.losses)
        spread = max(_SIGMA * median([abs(one - middle) for one in self.losses]), _SMALLEST_SPREAD * abs(middle))
        if loss <= middle + self.limit * spread:
            return ""
        return (
            f"the loss is {loss:.4g}, an outlier: the {len(self.losses)} before it have a median of {middle:.4g} and a spread of "
            f"{spread:.3g}, of which {self.limit:g} are allowed"
        )

    def end_mini_batch(self, trained: bool) -> None:
        """Remember the losses of a mini-batch that was trained on."""
        if trained:
            self.losses.extend(self._of_mini_batch)
        self._of_mini_batch.clear()


__all__ = ["LossOutliers"]
