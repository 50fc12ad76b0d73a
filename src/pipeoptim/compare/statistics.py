"""The arithmetic of a comparison: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

#: How far above the worst of the synchronous runs the target lies, as a share.
MARGIN = 0.01


@dataclass(frozen=True)
class Curve:
    """A figure that was taken after some of the steps."""

    steps: Sequence[int] = field(default_factory=list)
    values: Sequence[float] = field(default_factory=list)


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds.

    Args:
        mean: of those seeds that have one.
        deviation: sample standard deviation; 0 for one seed.
        low, high: smallest and largest.
        count: how many seeds have one.

    Example:
        >>> Spread.of([1.0, 3.0, None])
        Spread(mean=2.0, deviation=1.4142135623730951, low=1.0, high=3.0, count=2)
        >>> Spread.of([None]) is None
        True
    """

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """Over the values that are there; None if there are none."""
        there = [value for value in values if value is not None]
        if not there:
            return None
        return cls(mean(there), stdev(there) if len(there) > 1 else 0.0, min(there), max(there), len(there))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values, fewer at the start, in one pass.

    >>> smooth([2.0, 4.0, 6.0], 2)
    [2.0, 3.0, 5.0]
    """
    out: list[float] = []
    for i in range(len(values)):
        window = values[max(0, i + 1 - width) : i + 1]
        out.append(sum(window) / len(window))
    return out


def default_target(synchronous: Iterable[float | None]) -> float | None:
    """A loss that synchronous training reaches with every seed: its worst final validation loss, and 1 % more.

    >>> default_target([2.0, 1.9, None])
    2.02
    """
    there = [value for value in synchronous if value is not None]
    return max(there) * (1 + MARGIN) if there else None


def steps_to(curve: Curve, target: float | None) -> int | None:
    """The first step at which ``curve`` is at or below ``target``; None if it never is.

    >>> steps_to(Curve([10, 20, 30], [3.0, 2.0, 2.5]), 2.0)
    20
    """
    if target is None:
        return None
    return next((step for step, value in zip(curve.steps, curve.values, strict=True) if value <= target), None)


def share_of_gap(loss: float | None, synchronous: Spread | None, uncorrected: Spread | None) -> float | None:
    """How much of what asynchrony costs a method wins back: ``(naive - loss) / (naive - synchronous)``.

    1 is as good as synchronous training, 0 as bad as doing nothing; it may lie outside. None where asynchrony costs no more
    than the seeds differ (twice the larger deviation), because a share of noise means nothing.

    >>> share_of_gap(1.5, Spread.of([1.0]), Spread.of([2.0]))
    0.5
    >>> share_of_gap(1.5, Spread.of([1.0, 3.0]), Spread.of([2.0, 2.4])) is None
    True
    """
    if loss is None or synchronous is None or uncorrected is None:
        return None
    gap = uncorrected.mean - synchronous.mean
    if gap <= 2 * max(synchronous.deviation, uncorrected.deviation):
        return None
    return (uncorrected.mean - loss) / gap
