"""Start and end of every action when a forward takes ``t_forward`` and a backward ``t_backward``: the ideal schedule.

This is what the drawings show and what a measured run is held against. Transfers and updates take no time here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pipeoptim.errors import PipeOptimError
from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.actions_table import action_table, whole_run
from pipeoptim.schedule.program import Program
from pipeoptim.schedule.recurrence import StuckError, in_levels


class Span(NamedTuple):
    """One action on the clock: stage ``k`` does ``action`` from ``start`` to ``end`` (units of the caller's times)."""

    k: int
    action: Action
    start: float
    end: float


Durations = float | Sequence[float]


def timeline(
    program: Program, minibatches: int, t_forward: Durations = 1.0, t_backward: Durations = 2.0, delay: float = 0.0
) -> list[Span]:
    """When each action of a run happens, every stage working as early as its program and its neighbours allow.

    Args:
        program: what the stages do.
        minibatches: how many mini-batches are fed before the drain.
        t_forward, t_backward: duration of F and B of one micro-batch, on every stage or one per stage.
        delay: time that a message takes from one stage to the next.

    Returns:
        All spans, sorted by start, then stage.

    Raises:
        PipeOptimError: the program deadlocks.

    Example:
        >>> [f"{s.k}:{s.action}@{s.start:g}" for s in timeline(Program("gpipe", 2), 1) if s.action.kind != "U"]
        ['0:F0@0', '1:F0@1', '1:B0@2', '0:B0@4']
    """
    durations = {
        ActionKind.F: _per_stage(t_forward, program),
        ActionKind.B: _per_stage(t_backward, program),
        ActionKind.U: _per_stage(0.0, program),
    }
    plans = [whole_run(program, p, minibatches) for p in range(program.processes or program.depth)]
    return replay(plans, program.depth, lambda k, kind: durations[kind][k], delay)


def replay(
    plans: Sequence[Sequence[tuple[int, Action]]], depth: int, lasts: Callable[[int, ActionKind], float], delay: float = 0.0
) -> list[Span]:
    """As :func:`timeline`, for any lists of actions, one per process, each action with its stage.

    Args:
        plans: what each process does, in its order. They may be cut out of a longer run: an action whose neighbour's part
            is in none of the lists does not wait for it.
        depth: stages of the pipeline.
        lasts: ``lasts(k, kind)``, the duration of an action of stage k; asked once for each action, process after process.
        delay: time that a message takes from one stage to the next.

    Raises:
        PipeOptimError: the stages wait for one another for ever.

    Example:
        >>> plans = [[(0, Action(ActionKind.F, 7)), (0, Action(ActionKind.B, 6))], [(1, Action(ActionKind.F, 7))]]
        >>> [f"{s.k}:{s.action}@{s.start:g}" for s in replay(plans, 2, lambda k, kind: 1.0)]
        ['0:F7@0', '0:B6@1', '1:F7@1']
    """
    table = action_table(plans, depth)
    try:
        events = in_levels(table.before, table.needs)
    except StuckError as error:
        waiting = ", ".join("stage {} at {}".format(*table.action(v)) for v in error.events)
        raise PipeOptimError(f"the program deadlocks: {waiting}") from None
    steps = [step for plan in plans for step in plan]
    ends = events.ends(np.array([lasts(k, action.kind) for k, action in steps], float), arrives=delay)
    begins = events.begins(ends, arrives=delay).tolist()
    spans = [Span(*step, begin, end) for step, begin, end in zip(steps, begins, ends.tolist(), strict=True)]
    return sorted(spans, key=lambda s: (s.start, s.k))


def bubble(spans: list[Span], processes: int | None = None) -> float:
    """Share of the processes' time spent idle between the first start and the last end, 0 .. 1; None: one per stage."""
    busy = sum(s.end - s.start for s in spans)
    processes = processes or 1 + max(s.k for s in spans)
    length = max(s.end for s in spans) - min(s.start for s in spans)
    return 1.0 - busy / (processes * length)


def _per_stage(duration: Durations, program: Program) -> Sequence[float]:
    return [duration] * program.depth if isinstance(duration, (int, float)) else duration
