"""A whole run as arrays: every action of every process, what it follows and what it needs from a neighbouring stage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeoptim.schedule.actions import Action, ActionKind
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
    starts, columns = [0], []
    for plan in plans:
        if plan:
            stages, actions = zip(*plan, strict=True)
            kinds, numbers = zip(*actions, strict=True)
            columns.append(np.array((stages, [_NUMBER[kind] for kind in kinds], numbers), np.int32))
        starts.append(starts[-1] + len(plan))
    stage, kind, number = np.concatenate(columns, axis=1) if columns else np.empty((3, 0), np.int32)
    before = np.arange(-1, len(stage) - 1, dtype=np.int32)
    before[[start for start in starts[:-1] if start < len(stage)]] = NOTHING
    return ActionTable(depth, starts, stage, kind, number, before, _needs(stage, kind, number, depth))


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
