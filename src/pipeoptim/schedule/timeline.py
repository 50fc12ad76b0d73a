"""Start and end of every action when a forward takes ``t_forward`` and a backward ``t_backward``: the ideal schedule.

This is what the drawings show and what a measured run is held against. Transfers and updates take no time here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeoptim.errors import PipeOptimError
from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.program import Program


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
    plans = [_whole_run(program, p, minibatches) for p in range(program.processes or program.depth)]
    return replay(plans, program.depth, lambda k, kind: durations[kind][k], delay)


def replay(
    plans: Sequence[Sequence[tuple[int, Action]]], depth: int, lasts: Callable[[int, ActionKind], float], delay: float = 0.0
) -> list[Span]:
    """As :func:`timeline`, for any lists of actions, one per process, each action with its stage.

    Args:
        plans: what each process does, in its order. They may be cut out of a longer run: an action whose neighbour's part
            is in none of the lists does not wait for it.
        depth: stages of the pipeline.
        lasts: ``lasts(k, kind)``, the duration of an action of stage k; asked once for each of its actions, in their order.
        delay: time that a message takes from one stage to the next.

    Raises:
        PipeOptimError: the stages wait for one another for ever.

    Example:
        >>> plans = [[(0, Action(ActionKind.F, 7)), (0, Action(ActionKind.B, 6))], [(1, Action(ActionKind.F, 7))]]
        >>> [f"{s.k}:{s.action}@{s.start:g}" for s in replay(plans, 2, lambda k, kind: 1.0)]
        ['0:F7@0', '0:B6@1', '1:F7@1']
    """
    todo = [list(plan)[::-1] for plan in plans]  # reversed: the next action is taken off the end
    planned = {step for plan in plans for step in plan}
    clock = [0.0] * len(plans)
    # End of every F and B so far, which is when its result reaches the neighbour.
    done: dict[tuple[int, Action], float] = {}
    spans: list[Span] = []
    process_of = {k: p for p, plan in enumerate(plans) for k, _ in plan}
    awake = deque(range(len(plans)))  # processes that may be able to go on: one that waits is woken by its neighbours' progress
    while awake:
        p = awake.popleft()
        queue, neighbours = todo[p], set[int]()
        # As far as it gets: one wake-up may carry out a whole mini-batch.
        while queue and (ready := _ready_at(*queue[-1], depth, done, planned)) is not None:
            k, action = queue.pop()
            start = max(clock[p], ready)
            clock[p] = start + lasts(k, action.kind)
            done[k, action] = clock[p] + delay
            spans.append(Span(k, action, start, clock[p]))
            neighbours |= {k - 1, k + 1}
        awake += {process_of[k] for k in neighbours if k in process_of} - {p, *awake}
    if any(todo):  # every process waits for another one
        waiting = ", ".join(f"stage {queue[-1][0]} at {queue[-1][1]}" for queue in todo if queue)
        raise PipeOptimError(f"the program deadlocks: {waiting}")
    return sorted(spans, key=lambda s: (s.start, s.k))


def bubble(spans: list[Span], processes: int | None = None) -> float:
    """Share of the processes' time spent idle between the first start and the last end, 0 .. 1; None: one per stage."""
    busy = sum(s.end - s.start for s in spans)
    processes = processes or 1 + max(s.k for s in spans)
    length = max(s.end for s in spans) - min(s.start for s in spans)
    return 1.0 - busy / (processes * length)


def _whole_run(program: Program, p: int, minibatches: int) -> list[tuple[int, Action]]:
    fed = [a for n in range(minibatches) for a in program.process_step(p, n)]
    return fed + program.process_drain(p, minibatches)


def _per_stage(duration: Durations, program: Program) -> Sequence[float]:
    return [duration] * program.depth if isinstance(duration, (int, float)) else duration


def _ready_at(
    k: int, action: Action, depth: int, done: dict[tuple[int, Action], float], planned: set[tuple[int, Action]]
) -> float | None:
    """When the neighbour's result that ``action`` needs has arrived; None while it has not."""
    if (
        (action.kind is ActionKind.F and k == 0)
        or (action.kind is ActionKind.B and k == depth - 1)
        or action.kind is ActionKind.U
    ):
        return 0.0
    needed = (k - 1 if action.kind is ActionKind.F else k + 1, action)
    # Not planned: it lies before a list that was cut out of a longer run.
    return done.get(needed) if needed in planned else 0.0
