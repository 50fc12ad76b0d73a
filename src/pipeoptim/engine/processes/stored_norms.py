"""Norms of gradients that stages on several machines exchange through the store, where each of them may be replaced.

What is written there stays while a process that takes over may ask for it again, and is written again with the same bits::

    norms/<stage>/<turn modulo what is kept>  =  "<turn> <bits of the number>"

A read asks for those of all stages at once, and usually finds them: one way to the store and back per update.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

from pipeoptim.errors import StageFailure

_LONGEST_PAUSE = 0.01  # seconds between two looks


class StoredNorms:
    """Stage ``k``'s end.

    Args:
        store: of the pipeline.
        k, depth: this stage of how many.
        timeout: seconds to wait for another stage.
        kept: numbers of a stage that are kept: more than any stage can be behind another, or go back.
        while_waiting: called again and again while this stage waits.
    """

    def __init__(self, store: Store, k: int, depth: int, timeout: float, kept: int, while_waiting: Callable[[], None]) -> None:
        self._store, self._kept = store, kept
        self.k, self.depth, self.timeout = k, depth, timeout
        self._while_waiting = while_waiting
        self._interrupted = False

    def send(self, turn: int, number: float) -> None:
        """Write the ``turn``-th number of this stage."""
        self._store.set(self._key(self.k, turn), f"{turn} {struct.pack('<d', number).hex()}")

    def receive(self, turn: int) -> list[float]:
        """The ``turn``-th number of every stage; waits for those that are missing.

        Raises:
            StageFailure: a stage did not write it within the time-out.
        """
        end, pause = time.monotonic() + self.timeout, 0.0005
        found: list[float | None] = [None] * self.depth
        while True:
            missing = [j for j, number in enumerate(found) if number is None]
            if not missing:
                return [number for number in found if number is not None]
            if self._interrupted:
                raise StageFailure(f"the wait for the norm of stage {missing[0]} was interrupted")
            if time.monotonic() > end:
                raise StageFailure(f"stage {missing[0]} did not send the norm of its gradients within {self.timeout:g} s")
            for j, number in zip(missing, self._read(missing, turn), strict=True):
                found[j] = number
            if None in found:
                self._while_waiting()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def interrupt(self) -> None:
        """End a wait of this process, from another thread, and all later ones."""
        self._interrupted = True

    def close(self) -> None:
        """Nothing: the store is the supervisor's."""

    def _key(self, j: int, turn: int) -> str:
        return f"norms/{j}/{turn % self._kept}"

    def _read(self, stages: list[int], turn: int) -> list[float | None]:
        """What is there of their ``turn``-th numbers."""
        keys = [self._key(j, turn) for j in stages]
        # Not asked for unless they are there: the store would wait for them, and nothing else be looked after.
        there = keys if self._store.check(keys) else [key for key in keys if self._store.check([key])]
        found = dict(zip(there, self._store.multi_get(there) if there else (), strict=True))
        return [_number(found[key], turn) if key in found else None for key in keys]


def _number(text: bytes, turn: int) -> float | None:
    """The number, if it is that of ``turn``; what is there may be of an earlier one."""
    written, bits = text.decode().split()
    return float(struct.unpack("<d", bytes.fromhex(bits))[0]) if int(written) == turn else None
