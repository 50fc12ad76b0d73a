"""How far every process has come, for the words of a failure: processes that are fed different numbers of mini-batches wait in vain.

A process notes only that it has ended a stretch of training (drain, evaluation, close) and that it goes on; during training nothing
is written. When a wait fails, the failed process says where it is and looks where the others are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import inf

from pipeoptim.engine.processes.rendezvous import Rendezvous

TRAINS, EVALUATES, ENDED = "trains", "evaluates", "ended"
"""What a process does: it waits inside a mini-batch; it has ended those, and is inside an evaluation; it is at the end of both."""

_PATIENCE = 0.3  # seconds to hear from the others, which fail at about the same time

Place = tuple[int, int]
"""Mini-batches trained on, and batches evaluated since then."""


class TrainingProgress:
    """Of this process.

    Args:
        rendezvous: of the processes that must be given equally many mini-batches.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._meetings = [rendezvous]
        self._noted = ""
        self._store_lost = False

    def join(self, rendezvous: Rendezvous) -> None:
        """Also compare with others, such as the replicas of a stage."""
        self._meetings.append(rendezvous)

    def note_training(self) -> None:
        """A mini-batch begins."""
        # Nothing is written in the middle of training: this is the only look that a step costs.
        if self._noted:
            self._note("")

    def note_end(self, place: Place) -> None:
        """No mini-batch begins before the others have come as far."""
        self._note(f"{ENDED} {place[0]} {place[1]}")

    def note_evaluation(self, trained: int) -> None:
        """An evaluation begins after ``trained`` mini-batches; how many batches it has nobody knows yet."""
        self._note(f"{EVALUATES} {trained} 0")

    def difference(self, doing: str, place: Place) -> str:
        """A sentence about processes that were given different numbers; empty where none is known.

        ``doing``: what this process was at when it failed, at ``place``, the mini-batch or batch that it was inside included.
        """
        own = f"{doing} {place[0]} {place[1]}"
        self._note(own)
        until = time.monotonic() + _PATIENCE
        while not self._store_lost and time.monotonic() < until:
            for rendezvous in self._meetings:
                if found := _compared(rendezvous.name, {rendezvous.index: own, **self._others(rendezvous)}):
                    return found
            time.sleep(0.03)
        return ""

    def _note(self, text: str) -> None:
        if text != self._noted and not self._store_lost:
            self._noted = text
            try:
                for rendezvous in self._meetings:
                    rendezvous.store.set(f"progress/{rendezvous.index}", text)
            except RuntimeError:  # it is gone with its process
                self._store_lost = True

    def _others(self, rendezvous: Rendezvous) -> dict[int, str]:
        found: dict[int, str] = {}
        try:
            for j in range(len(rendezvous.ranks)):
                key = f"progress/{j}"
                if j != rendezvous.index and rendezvous.store.check([key]):
                    note = rendezvous.store.get(key).decode()
                    found |= {j: note} if note else {}
        except RuntimeError:
            self._store_lost = True
        return found


def _compared(name: str, notes: Mapping[int, str]) -> str:
    """Who has ended before another; ``notes`` by the number that goes into ``name``."""
    ended: dict[int, tuple[float, float]] = {}
    reached: dict[int, Place] = {}
    for j, note in notes.items():
        kind, *numbers = note.split()
        reached[j] = (int(numbers[0]), int(numbers[1]))
        if kind != TRAINS:
            ended[j] = reached[j] if kind == ENDED else (reached[j][0], inf)
    if not ended:
        return ""
    short, far = min(ended, key=lambda j: ended[j]), max(reached, key=lambda j: reached[j])
    # Everybody has come as far as the one that ended first: the wait failed for another reason.
    if reached[far] <= ended[short]:
        return ""
    part, what = (0, "mini-batches") if reached[far][0] != ended[short][0] else (1, "batches to evaluate")
    return (
        f"{name.format(short)} ended after {ended[short][part]} {what}, but {name.format(far)} was given {reached[far][part]}; give all "
        "processes equally many, from loaders of one length"
    )
