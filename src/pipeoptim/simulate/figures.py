"""Which numbers can be reckoned with: neither so large nor so small that sums of their products and quotients are no numbers any more."""

from __future__ import annotations

from typing import Any

MOST, LEAST = 1e30, 1e-30
"""Seconds, bytes, shares: far beyond anything that there is."""


def is_figure(value: Any) -> bool:
    """A number from 0 to MOST.

    >>> [is_figure(value) for value in (0, 1.5, -1, float("inf"), float("nan"), True, "1", 10**400)]
    [True, True, False, False, False, False, False, False]
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MOST


def is_divisor(value: Any) -> bool:
    """A number of at least LEAST, perhaps infinite: what others are divided by.

    >>> [is_divisor(value) for value in (25e9, float("inf"), 0, 1e-320, float("nan"), True)]
    [True, True, False, False, False, False]
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= LEAST
