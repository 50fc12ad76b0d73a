"""Happens-before between stages: which updates of other stages precede a stage's own, whatever the stages' speeds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pipeoptim.schedule.actions import ActionKind
from pipeoptim.schedule.program import Program
from pipeoptim.schedule.timeline import Span, replay


@lru_cache(maxsize=256)
def common_delay(program: Program, stages: tuple[int, ...]) -> int:
    """The smallest d such that update n of each of ``stages`` comes after update n - d of all of them without waiting for it.

    "Comes after" in the action program alone: by the order of each stage's actions, and because an F needs the F of the stage before
    and a B the B of the stage behind. So what a stage sends at its update n - d has arrived when the others make update n.
    0 where the pipeline flushes: there every stage finishes its backwards before any stage continues.

    Args:
        program: of the pipeline.
        stages: those that exchange something at every update.

    Example:
        >>> common_delay(Program("async_1f1b", 4), (0, 3)), common_delay(Program("async_1f1b", 4, 4), (0, 3))
        (4, 1)
        >>> common_delay(Program("async_1f1b", 4), (0, 2)), common_delay(Program("1f1b", 4, 4), (0, 3))
        (3, 0)
    """
    if program.flushes:
        return 0
    processes = range(program.processes or program.depth)
    fed = 4 * -(-program.warm_up // program.microbatches) + 2  # until the warm-up is over: there, fewer updates are ordered
    plans = [[a for n in range(fed) for a in program.process_step(p, n)] for p in processes]
    found = 0
    for span, updates in _updates_before(replay(plans, program.depth, lambda k, kind: 1.0), program):  # noqa: ARG005
        if span.action.kind is ActionKind.U and span.k in stages:
            found = max(found, span.action.number + 1 - min(updates[j] for j in stages))
    return found


def _updates_before(spans: Sequence[Span], program: Program) -> list[tuple[Span, list[int]]]:
    """Each action, in a topological order, with the updates that every stage is known to have made by its end."""
    of_process = [[0] * program.depth for _ in range(program.processes or program.depth)]
    of_action: dict[tuple[int, ActionKind, int], list[int]] = {}
    result = []
    for span in spans:
        k, (kind, number) = span.k, span.action
        p = program.process_of(k)
        # F of the first stage and B of the last have no such neighbour: they know what their process knows.
        needed = of_action.get((k - 1 if kind is ActionKind.F else k + 1, kind, number), of_process[p])
        known = list(map(max, of_process[p], of_process[p] if kind is ActionKind.U else needed))
        # Vector clocks, with updates as the events that count.
        known[k] += kind is ActionKind.U
        of_process[p] = of_action[k, kind, number] = known
        result.append((span, known))
    return result


__all__ = ["common_delay"]
