"""Why each stage was idle, and what the length of a run consists of: the critical path, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeoptim.errors import counted
from pipeoptim.schedule.actions_table import B, F, U
from pipeoptim.schedule.recurrence import NOTHING, Seconds
from pipeoptim.simulate.timed_events import ACTIVATION, AVERAGE, GRADIENT, TimedEvents


@dataclass(frozen=True)
class StageWaits:
    """Shares of a span of time, of one stage.

    Attributes:
        busy: F, B, U and predictions.
        activations, gradients: nothing but waiting for those of the stage before, or behind.
        replicas: waiting for the gradients of other replicas.
    """

    busy: float
    activations: float
    gradients: float
    replicas: float


def stage_waits(timed: TimedEvents, lasts: Seconds, ends: Seconds, window: tuple[float, float]) -> list[StageWaits]:
    """What the stages of the first replica did between two moments.

    Args:
        lasts, ends: of all events, of one draw.
    """
    table, count = timed.table, len(timed.table)
    begins = timed.events.begins(ends, timed.prepares, timed.arrives)[:count]
    before = timed.events.before[:count]
    free = np.where(before == NOTHING, 0.0, ends[before])
    prepared = free + timed.prepares[:count]
    busy = _overlap(begins, begins + lasts[:count], window) + _overlap(free, prepared, window)
    idle = _overlap(prepared, begins, window)
    length = (window[1] - window[0]) or 1.0

    def shares(seconds: Seconds) -> list[float]:
        found: list[float] = (np.bincount(table.stage, seconds, table.depth) / length).tolist()
        return found

    waits = (shares(np.where(table.kind == kind, idle, 0.0)) for kind in (F, B, U))
    return [StageWaits(*row) for row in zip(shares(busy), *waits, strict=True)]


def _overlap(begin: Seconds, end: Seconds, window: tuple[float, float]) -> Seconds:
    """Seconds of each span that lie within ``window``."""
    found: Seconds = np.clip(end, *window) - np.clip(begin, *window)
    return found


@dataclass(frozen=True)
class PathPart:
    """What one kind of event adds to the critical path.

    Attributes:
        what: F, B, U, predictions, activations, gradients or averages.
        stage: where it happens, or which stage sends it.
        share: of the path.
    """

    what: str
    stage: int
    share: float


_NAMES = {F: "F", B: "B", U: "U", ACTIVATION: "activations", GRADIENT: "gradients", AVERAGE: "averages"}
_ARRIVES = {F: (ACTIVATION, -1), B: (GRADIENT, 1), U: (AVERAGE, 0)}
"""Kind of an action -> what it may wait for, and from which stage."""


def critical_path(timed: TimedEvents, lasts: Seconds, ends: Seconds, window: tuple[float, float]) -> list[PathPart]:
    """What the time between two moments went to: from the last end in it back, each time to what was waited for. The largest first.

    Args:
        lasts, ends: of all events, of one draw.
    """
    before, needs = timed.events.before, timed.events.needs
    spent: dict[tuple[str, int], float] = defaultdict(float)

    def add(what: str, stage: int, begin: float, end: float) -> None:
        spent[what, stage] += max(0.0, end - max(begin, window[0]))

    v = int(np.where(ends <= window[1], ends, -1.0).argmax())
    while v != NOTHING and ends[v] > window[0]:
        kind, stage = int(timed.kind[v]), int(timed.stage[v])
        begin = ends[v] - lasts[v]
        add(_NAMES[kind], stage, begin, ends[v])
        previous, needed = int(before[v]), int(needs[v])
        free = ends[previous] if previous != NOTHING else 0.0
        if needed != NOTHING and ends[needed] + timed.arrives[v] > free + timed.prepares[v]:
            arriving, towards = _ARRIVES.get(kind, (kind, 0))
            add(_NAMES[arriving], stage + towards, ends[needed], begin)
            v = needed
        else:
            add("predictions", stage, free, begin)
            v = previous
    total = sum(spent.values()) or 1.0
    found = [PathPart(what, stage, seconds / total) for (what, stage), seconds in spent.items() if seconds > 0]
    return sorted(found, key=lambda part: -part.share)


def path_words(path: Sequence[PathPart]) -> str:
    """What a critical path consists of, by kind, and where most of each is.

    Example:
        >>> path_words([PathPart("B", 1, 0.5), PathPart("F", 1, 0.2), PathPart("F", 0, 0.2), PathPart("gradients", 1, 0.1)])
        'B 50% (stage 1), F 40% (over 2 stages, most on stage 1), gradients on their way 10% (from stage 1)'
    """
    kinds: dict[str, list[PathPart]] = defaultdict(list)
    for part in path:
        kinds[part.what].append(part)
    sums = {what: sum(part.share for part in parts) for what, parts in kinds.items()}
    words = []
    for what in sorted(sums, key=lambda what: -sums[what]):
        if sums[what] >= 0.005:
            most, moves = kinds[what][0].stage, what in ("activations", "gradients")
            on = "from" if moves else "on"
            where = f"{on} stage {most}".removeprefix("on ")
            if len(kinds[what]) > 1:
                where = f"over {counted(len(kinds[what]), 'stage')}, most {on} stage {most}"
            words.append(f"{what}{' on their way' if moves else ''} {sums[what]:.0%} ({where})")
    return ", ".join(words)
