"""A whole run as arrays: every action of every process, what it follows and what it needs from a neighbouring stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.program import Program
from pipeoptim.schedule.recurrence import NOTHING, Numbers

KINDS = (ActionKind.F, ActionKind.B, ActionKind.U)
"""By their numbers in :class:`ActionTable`."""

F, B, U = range(3)
_NUMBER = {kind: n for n, kind in enumerate(KINDS)}


@dataclass(frozen=True)
class ActionTable:
    """Actions, process after process, each process's in its order.

    Attributes:
        depth: stages of the pipeline.
        starts: where each process begins, and the end.
        stage, kind, number: of each action; ``kind`` counts in KINDS.
        before: the action before it on its process, or NOTHING.
        needs: the action of a neighbouring stage whose result it needs, or NOTHING.
    """

    depth: int
    starts: Sequence[int]
    stage: Numbers
    kind: Numbers
    number: Numbers
    before: Numbers
    needs: Numbers

    def __len__(self) -> int:
        return len(self.stage)

    def action(self, v: int) -> tuple[int, Action]:
        """Stage and action number ``v``."""
        return int(self.stage[v]), Action(KINDS[self.kind[v]], int(self.number[v]))


def action_table(plans: Iterable[Sequence[tuple[int, Action]]], depth: int) -> ActionTable:
    """The actions of ``plans``, one list per process, each action with its stage.

    A list may be cut out of a longer run: an action needs only what is in one of the lists.
    """
    return _table([_columns(*zip(*plan, strict=True)) if plan else np.empty((3, 0), np.int32) for plan in plans], depth)


def program_table(program: Program, minibatches: int) -> ActionTable:
    """The actions of a run of ``minibatches`` mini-batches, drained at the end: what the engines carry out, process by process."""
    if program.interleaved:
        return action_table((whole_run(program, p, minibatches) for p in range(program.processes or 0)), program.depth)
    columns: list[Numbers] = []
    last: list[Action] = []
    for k in range(program.depth):
        actions = program.full(k, minibatches)
        # Stages far from the last one do the same in a short run: a comparison takes a fifth of the time of a conversion, which is a
        # second in all at 10,000 stages (`simulate --stages 10000`).
        if actions == last:
            columns.append(columns[-1] + np.array([[1], [0], [0]], np.int32))
        else:
            columns.append(_columns((k,) * len(actions), actions))
        last = actions
    return _table(columns, program.depth)


def _columns(stages: Sequence[int], actions: Sequence[Action]) -> Numbers:
    """Stage, kind and number of each."""
    kinds, numbers = zip(*actions, strict=True)
    return np.array((stages, [_NUMBER[kind] for kind in kinds], numbers), np.int32)


def _table(columns: Sequence[Numbers], depth: int) -> ActionTable:
    starts = [0, *accumulate(one.shape[1] for one in columns)]
    stage, kind, number = np.concatenate(columns, axis=1)
    before = np.arange(-1, len(stage) - 1, dtype=np.int32)
    before[[start for start in starts[:-1] if start < len(stage)]] = NOTHING
    return ActionTable(depth, starts, stage, kind, number, before, _needs(stage, kind, number, depth))


def whole_run(program: Program, p: int, minibatches: int) -> list[tuple[int, Action]]:
    """What process ``p`` does in such a run, each action with its stage."""
    fed = [step for n in range(minibatches) for step in program.process_step(p, n)]
    return fed + program.process_drain(p, minibatches)


def _needs(stage: Numbers, kind: Numbers, number: Numbers, depth: int) -> Numbers:
    """An F needs that of the stage before, a B that of the stage behind."""
    needs = np.full(len(stage), NOTHING, np.int32)
    if not len(stage):
        return needs
    first = int(number.min())
    for which, towards in ((F, -1), (B, 1)):
        own = np.flatnonzero(kind == which)
        where = np.full(
            (depth + 2, int(number.max()) - first + 1), NOTHING, np.int32
        )  # a stage more on either side has nothing
        where[stage[own] + 1, number[own] - first] = own
        needs[own] = where[stage[own] + 1 + towards, number[own] - first]
    return needs
