"""How far every process has come, for the words of a failure: processes that are fed different numbers of mini-batches wait in vain.

A process notes only that it has ended a stretch of training (drain, evaluation, close) and that it goes on; during training nothing
is written. When a wait fails, the failed process says where it is and looks where the others are.
"""

from __future__ import annotations

import time
from contextlib import suppress

from pipeoptim.engine.processes.rendezvous import Rendezvous

_PATIENCE = 0.3  # seconds to hear from the others, which fail at about the same time

Place = tuple[int, int]
"""Mini-batches trained on, and batches evaluated since then."""


class TrainingProgress:
    """Of this process, in the store of ``rendezvous``."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self.rendezvous = rendezvous
        self._noted = ""

    def note_training(self) -> None:
        """A mini-batch begins."""
        if self._noted:
            self._note("")

    def note_end(self, place: Place) -> None:
        """No mini-batch begins before the others have come as far."""
        self._note(f"end {place[0]} {place[1]}")

    def difference(self, training: bool, place: Place) -> str:
        """A sentence about processes that were fed different numbers; empty where none is known.

        ``training``: whether this process waited inside a mini-batch, the last one in ``place``.
        """
        own = f"{'wait' if training else 'end'} {place[0]} {place[1]}"
        self._note(own)
        until = time.monotonic() + _PATIENCE
        while not (found := self._compared(own)) and time.monotonic() < until:
            time.sleep(0.03)
        return found

    def _note(self, text: str) -> None:
        if text != self._noted:
            self._noted = text
            with suppress(RuntimeError):  # the store is gone with its process: whoever can tell is asked no more
                self.rendezvous.store.set(f"progress/{self.rendezvous.index}", text)

    def _compared(self, own: str) -> str:
        notes = {self.rendezvous.index: own, **self._others()}
        ended, reached = {}, {}
        for j, note in notes.items():
            kind, *numbers = note.split()
            place = (int(numbers[0]), int(numbers[1]))
            reached[j] = place
            if kind == "end":
                ended[j] = place
        if not ended:
            return ""
        short, far = min(ended, key=lambda j: ended[j]), max(reached, key=lambda j: reached[j])
        return self._told(short, ended[short], far, reached[far]) if reached[far] > ended[short] else ""

    def _told(self, short: int, ended: Place, far: int, reached: Place) -> str:
        trained = ended[0] != reached[0]
        what, n, m = ("mini-batches", ended[0], reached[0]) if trained else ("batches to evaluate", ended[1], reached[1])
        name = self.rendezvous.name
        return (
            f"{name.format(short)} ended after {n} {what}, but {name.format(far)} was given {m}; give all processes equally many, from "
            "loaders of one length"
        )

    def _others(self) -> dict[int, str]:
        found: dict[int, str] = {}
        with suppress(RuntimeError):
            for j in range(len(self.rendezvous.ranks)):
                key = f"progress/{j}"
                if j != self.rendezvous.index and self.rendezvous.store.check([key]):
                    note = self.rendezvous.store.get(key).decode()
                    found |= {j: note} if note else {}
        return found
