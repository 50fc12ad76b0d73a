"""The model of time: events that begin when the two things they wait for have ended.

What a process does, and what a link transmits, is a chain of events. Besides the event before it in its chain, an event may need one
event of another chain, whose result takes a while to arrive::

    begin[v] = max(end[before[v]] + prepares[v], end[needs[v]] + arrives[v])
    end[v]   = begin[v] + lasts[v]

This is a max-plus recurrence, so every end grows with every duration. It is solved level by level: events of one level need none of the
same, so that numpy takes them in one go, for many drawn durations at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]]
Seconds = NDArray[np.float64]

NOTHING = -1
"""In place of an event: there is none to wait for."""


class StuckError(Exception):
    """Events wait for one another for ever: ``events``, the first of them in each chain."""

    def __init__(self, events: list[int]) -> None:
        super().__init__(f"{len(events)} chains of events wait for one another")
        self.events = events


@dataclass(frozen=True)
class Events:
    """Which events there are, in levels; made by :func:`in_levels`, and solved any number of times.

    Attributes:
        before, needs: per event the number of another one, or NOTHING.
        order: the events, level by level.
        levels: where each level begins in ``order``, and the end.
    """

    before: Numbers
    needs: Numbers
    order: Numbers
    levels: list[int]

    def __len__(self) -> int:
        return len(self.before)

    def ends(self, lasts: Seconds, prepares: Seconds | None = None, arrives: Seconds | float = 0.0) -> Seconds:
        """When every event ends, the first at 0 or later.

        Args:
            lasts: seconds of each event; with a second dimension, for each of several draws.
            prepares: seconds between the event before and this one that do not wait for ``needs``; none by default.
            arrives: seconds from the end of what an event needs until it is there, for all events or one for each.

        Example:
            >>> graph = in_levels(np.array([NOTHING, 0, NOTHING]), np.array([NOTHING, NOTHING, 0]))
            >>> graph.ends(np.array([1.0, 1.0, 5.0]), arrives=0.5).tolist()
            [1.0, 2.0, 6.5]
        """
        count, order = len(self), self.order
        place = np.empty(count + 1, np.int32)  # in the order of levels; of NOTHING, which is the last one, behind them all
        place[order], place[NOTHING] = np.arange(count, dtype=np.int32), count
        before, needs = place[self.before[order]], place[self.needs[order]]
        each = lasts[order]
        early = None if prepares is None else _like(prepares[order], each)
        late = _like(np.where(needs < count, np.broadcast_to(arrives, count)[order], 0.0), each)
        end = np.zeros((count + 1, *each.shape[1:]))  # that of NOTHING stays 0
        for first, stop in zip(self.levels, self.levels[1:], strict=False):
            free = end[before[first:stop]]
            if early is not None:
                free += early[first:stop]
            there = end[needs[first:stop]]
            there += late[first:stop]
            np.maximum(free, there, out=free)
            np.add(free, each[first:stop], out=end[first:stop])
        found = np.empty_like(each)
        found[order] = end[:count]
        return found

    def begins(self, ends: Seconds, prepares: Seconds | None = None, arrives: Seconds | float = 0.0) -> Seconds:
        """When every event began, from what :meth:`ends` returned for the same times."""
        behind = np.concatenate((ends, np.zeros((1, *ends.shape[1:]))))  # NOTHING is the last one
        free, there = behind[self.before], behind[self.needs]
        if prepares is not None:
            free += _like(prepares, free)
        there += _like(np.where(self.needs != NOTHING, np.broadcast_to(arrives, len(self)), 0.0), there)
        begins: Seconds = np.maximum(free, there)
        return begins


def _like(values: Seconds, each: Seconds) -> Seconds:
    """With as many dimensions as ``each``."""
    return values[:, None] if each.ndim > values.ndim else values


def in_levels(before: Numbers, needs: Numbers) -> Events:
    """Sort events so that each comes after those it waits for.

    Args:
        before, needs: per event; no event is ``before`` of two others, nor needed by two.

    Raises:
        StuckError: that is impossible.
    """
    count = len(before)
    numbers = np.arange(count, dtype=np.int32)
    after, needed_by = np.full(count + 1, count, np.int32), np.full(count + 1, count, np.int32)
    after[before], needed_by[needs] = numbers, numbers
    after[NOTHING] = needed_by[NOTHING] = count
    waits = np.zeros(count + 1, np.int32)
    waits[:count] = (before != NOTHING) + (needs != NOTHING).astype(np.int32)
    waits[count] = 2**30  # stands for NOTHING, and is never ready
    order, levels = np.empty(count, np.int32), [0]
    ready = numbers[waits[:count] == 0]
    while ready.size:
        begin, end = levels[-1], levels[-1] + ready.size
        order[begin:end] = ready
        levels.append(end)
        here, there = after[ready], needed_by[ready]
        # One after the other: within each of the two no event occurs twice, so that the subtraction counts all.
        waits[here] -= 1
        waits[there] -= 1
        here = here[waits[here] == 0]
        waits[here] = -1  # not again, where both that it waited for were on this level
        ready = np.concatenate((here, there[waits[there] == 0]))
    if levels[-1] < count:
        stuck = waits[:count] > 0
        stuck[numbers[before != NOTHING]] &= waits[before[before != NOTHING]] <= 0  # the first of each chain
        raise StuckError(np.flatnonzero(stuck).tolist())
    return Events(before, needs, order, levels)
