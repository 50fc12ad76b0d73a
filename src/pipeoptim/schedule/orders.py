"""The orders in which a stage works: asynchronous 1F1B, and the two that flush (GPipe, 1F1B).

An order answers two questions about stage ``k`` of ``depth``: what happens when mini-batch ``n`` is fed
(:meth:`Order.step`) and what is left to do once ``n`` mini-batches were fed and no more come (:meth:`Order.drain`).
A new order is a new class here with an entry in :data:`ORDERS`; engines, drawings and gap counts follow by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from pipeoptim.schedule.actions import Action, Kind


class Order(Protocol):
    """What a stage does, mini-batch after mini-batch. ``k`` is the stage, ``m`` the micro-batches per mini-batch."""

    name: str
    flushes: bool

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        """Actions of stage ``k`` when mini-batch ``n`` is fed."""
        ...

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        """Actions of stage ``k`` that finish what is in flight after ``n`` mini-batches were fed."""
        ...

    def in_flight(self, k: int, depth: int, m: int) -> int:
        """The most micro-batches whose forward is done and whose backward is not, on stage ``k``."""
        ...


def _backward(i: int, m: int) -> list[Action]:
    """B of micro-batch ``i``, and the update where ``i`` is the last of its mini-batch."""
    done = [Action(Kind.B, i)]
    if (i + 1) % m == 0:
        done.append(Action(Kind.U, i // m))
    return done


class AsyncOneFOneB:
    """1F1B that never flushes: F(0) .. F(D-1-k), B(0) U, F(D-k), B(1) U, ... (PipeDream, SOSP 2019, figure 8)."""

    name = "async_1f1b"
    flushes = False

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = depth - 1 - k
        actions: list[Action] = []
        for i in range(n * m, (n + 1) * m):
            actions.append(Action(Kind.F, i))
            if i >= ahead:
                actions += _backward(i - ahead, m)
        return actions

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = depth - 1 - k
        return [a for i in range(max(0, n * m - ahead), n * m) for a in _backward(i, m)]

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return depth - k


class GPipe:
    """All forwards, then all backwards, then the update; the pipeline is empty between mini-batches (GPipe, 2019)."""

    name = "gpipe"
    flushes = True

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        batch = range(n * m, (n + 1) * m)
        return [Action(Kind.F, i) for i in batch] + [a for i in batch for a in _backward(i, m)]

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        return []

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return m


class OneFOneBFlush:
    """1F1B inside a mini-batch, flushed at its end (DAPPLE; PipeDream-Flush): the bubble of GPipe, D-k activations."""

    name = "1f1b"
    flushes = True

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = min(depth - 1 - k, m)
        first, end = n * m, (n + 1) * m
        actions = [Action(Kind.F, i) for i in range(first, first + ahead)]
        for i in range(first + ahead, end):
            actions += [Action(Kind.F, i), *_backward(i - ahead, m)]
        return actions + [a for i in range(end - ahead, end) for a in _backward(i, m)]

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        return []

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return min(depth - k, m)


ORDERS: Mapping[str, Order] = MappingProxyType({o.name: o for o in (AsyncOneFOneB(), GPipe(), OneFOneBFlush())})
