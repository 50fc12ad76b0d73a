"""What slack can win at best: the action program with forwards of T/3, backwards of 2T/3, messages that take time, and jitter.

Nothing is measured: each action begins when the one before it on its stage and the message that it needs are there (a max-plus recurrence,
:func:`pipeoptim.schedule.timeline.replay`), so every machine gives the same figures.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.schedule import ActionKind, Program, replay

CONDITIONS = {"delay 0.3 T": (0.3, 0.0), "delay 1.0 T": (1.0, 0.0), "jitter 0.3": (0.0, 0.3), "both, 0.3 T": (0.3, 0.3)}
"""Name -> delay of every message in units of T, and sigma of a log-normal factor on every forward and backward."""


def efficiency(program: Program, delay: float, jitter: float, minibatches: int = 600, seed: int = 0) -> float:
    """Mini-batches per second times the seconds that the busiest stage computes for one: 1 at best.

    Args:
        program: M = 1, one stage per process.
        delay, jitter: see ``CONDITIONS``.

    Example:
        >>> round(efficiency(Program("async_1f1b", 4), 0.3, 0.0), 2), round(efficiency(Program("async_1f1b", 4, slack=1), 0.3, 0.0), 2)
        (0.69, 1.0)
    """
    draw, busy = random.Random(seed), [0.0] * program.depth

    def lasts(k: int, kind: ActionKind) -> float:
        if kind is ActionKind.U:
            return 0.0
        seconds = (1 if kind is ActionKind.F else 2) / 3 * (draw.lognormvariate(0.0, jitter) if jitter else 1.0)
        busy[k] += seconds
        return seconds

    plans = [[action for n in range(minibatches) for action in program.process_step(k, n)] for k in range(program.depth)]
    ends = {
        span.action.number: span.end
        for span in replay(plans, program.depth, lasts, delay)
        if span.k == 0 and span.action.kind is ActionKind.U
    }
    # The last forwards have no backwards in these plans: what is compared lies between the warm-up and the newest update.
    first, last = 2 * program.warm_up, max(ends)
    return max(busy) / minibatches * (last - first) / (ends[last] - ends[first])


def ideal_windows(
    program: Program, jitter: float, warm_up: int, steps: int, repeats: int, own_work: float = 0.0
) -> list[float]:
    """What ``bench efficiency`` would measure on its devices, with the same draws, if nothing but the devices and ``own_work`` took time.

    Args:
        program: M = 1, one stage per process.
        jitter: of the devices; that of stage k draws with the seed k.
        warm_up, steps, repeats: mini-batches before each window and in it, and windows.
        own_work: what every mini-batch of a stage takes in addition, after its backward, in units of T; it counts for nothing.

    Example:
        >>> ideal_windows(Program("async_1f1b", 2), 0.0, warm_up=4, steps=10, repeats=2)
        [1.0, 1.0]
        >>> ideal_windows(Program("async_1f1b", 2), 0.0, warm_up=4, steps=10, repeats=2, own_work=0.25)
        [0.8, 0.8]
    """
    draws = [random.Random(k) for k in range(program.depth)]

    def lasts(k: int, kind: ActionKind) -> float:
        if kind is ActionKind.U:
            return own_work
        return (1 if kind is ActionKind.F else 2) / 3 * (draws[k].lognormvariate(0.0, jitter) if jitter else 1.0)

    count = repeats * (warm_up + steps)
    plans = [[program.process_step(k, n) for n in range(count)] for k in range(program.depth)]
    whole = [list(chain.from_iterable(plan)) for plan in plans]
    spans = {(span.k, span.action): span for span in replay(whole, program.depth, lasts)}
    found = []
    for first in range(warm_up, count, warm_up + steps):
        busy, seconds = [], []
        for plan in plans:
            inside = [spans[one] for actions in plan[first : first + steps] for one in actions]
            busy.append(sum(span.end - span.start for span in inside if span.action.kind is not ActionKind.U))
            seconds.append(inside[-1].end - spans[plan[first - 1][-1]].end)
        found.append(round(max(busy) / max(seconds), 6))
    return found


def measure(depths: Sequence[int], slacks: Sequence[float]) -> Record:
    """All conditions, depths and slacks."""
    rows = [
        ResultRow(
            f"{name}, D={depth}, slack {slack:g}",
            [efficiency(Program("async_1f1b", depth, slack=slack), *condition)],
            {"conditions": name, "depth": depth, "slack": slack},
        )
        for name, condition in CONDITIONS.items()
        for slack in slacks
        for depth in depths
    ]
    return Record("slack", "efficiency", {"order": "async 1F1B", "microbatches": 1}, rows)


def columns(record: Record) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a line per condition, a column per slack with the efficiencies at all depths."""
    slacks = list(dict.fromkeys(row.settings["slack"] for row in record.rows))
    depths = list(dict.fromkeys(row.settings["depth"] for row in record.rows))
    found: dict[str, dict[float, list[str]]] = {}
    for row in record.rows:
        cells = found.setdefault(row.settings["conditions"], {slack: [] for slack in slacks})
        cells[row.settings["slack"]].append(f"{row.median:.2f}")
    head = [f"efficiency at D = {', '.join(map(str, depths))}", *(f"slack {slack:g}" for slack in slacks)]
    return head, [[name, *(" / ".join(cells[slack]) for slack in slacks)] for name, cells in found.items()]
