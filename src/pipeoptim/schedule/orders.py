"""The orders in which a stage works: asynchronous 1F1B, plain and interleaved, and the two that flush (GPipe, 1F1B).

An order answers two questions about stage ``k`` of ``depth``: what happens when mini-batch ``n`` is fed
(:meth:`Order.step`) and what is left to do once ``n`` mini-batches were fed and no more come (:meth:`Order.drain`).
A new order is a new class here with an entry in :data:`ORDERS`; engines, drawings and gap counts follow by themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from types import MappingProxyType
from typing import ClassVar

from pipeoptim.errors import ConfigError
from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.slack import Slack, forwards_ahead


class Order(ABC):
    """What a stage does, mini-batch after mini-batch. ``k`` is the stage, ``m`` the micro-batches per mini-batch.

    Attributes:
        name: its key in :data:`ORDERS`.
        flushes: whether the pipeline is empty between mini-batches.
        interleaves: whether several stages may share a process.
        interleaved_as: the order that takes its place where several stages share a process; None if there is none.
    """

    name: ClassVar[str]
    flushes: ClassVar[bool]
    interleaves: ClassVar[bool] = False
    interleaved_as: ClassVar[str | None] = None

    @abstractmethod
    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        """Actions of stage ``k`` when mini-batch ``n`` is fed."""

    @abstractmethod
    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        """Actions of stage ``k`` that finish what is in flight after ``n`` mini-batches were fed."""

    def in_flight(self, k: int, depth: int, m: int) -> int:
        """The most micro-batches whose forward is done and whose backward is not, on stage ``k``: counted, unless a formula is known."""
        flying = most = 0
        for n in range(2 * self.warm_up(depth, m) + 2):
            for action in self.step(k, depth, m, n):
                flying += {ActionKind.F: 1, ActionKind.B: -1}.get(action.kind, 0)
                most = max(most, flying)
        return most

    def warm_up(self, depth: int, m: int) -> int:
        """Mini-batches after which what every stage does repeats."""
        return depth

    def on_processes(self, processes: int) -> Order:
        """The same order with its stages dealt to ``processes``; itself where every stage has a process of its own."""
        return self

    def with_slack(self, slack: Slack) -> Order:
        """The same order with more micro-batches in flight.

        Raises:
            ConfigError: it cannot have them.
        """
        raise ConfigError(
            f"order {self.name!r} cannot have slack: it flushes, so all micro-batches of a mini-batch and no others may be in flight; "
            "leave slack out, or choose an asynchronous method, for example 'pipeoptim'"
        )

    def process_step(self, p: int, depth: int, m: int, n: int) -> list[tuple[int, Action]]:
        """What process ``p`` does when mini-batch ``n`` is fed, each action with its stage."""
        return [(p, action) for action in self.step(p, depth, m, n)]

    def process_drain(self, p: int, depth: int, m: int, n: int) -> list[tuple[int, Action]]:
        """What process ``p`` still does after ``n`` mini-batches."""
        return [(p, action) for action in self.drain(p, depth, m, n)]


def _backward_and_update(i: int, m: int) -> list[Action]:
    """B of micro-batch ``i``, and the update where ``i`` is the last of its mini-batch."""
    done = [Action(ActionKind.B, i)]
    if (i + 1) % m == 0:
        done.append(Action(ActionKind.U, i // m))
    return done


@dataclass(frozen=True)
class AsyncOneFOneB(Order):
    """1F1B that never flushes: F(0) .. F(D-1-k), B(0) U, F(D-k), B(1) U, ... (PipeDream, SOSP 2019, figure 8).

    Args:
        slack: moves every B of stage k behind later forwards, see :func:`~pipeoptim.schedule.slack.forwards_ahead`.
    """

    slack: Slack = 0.0
    name: ClassVar[str] = "async_1f1b"
    flushes: ClassVar[bool] = False
    interleaved_as: ClassVar[str | None] = "async_interleaved"

    def with_slack(self, slack: Slack) -> AsyncOneFOneB:
        return replace(self, slack=slack)

    def ahead(self, k: int, depth: int) -> int:
        """Forwards of stage ``k`` before its first backward, besides that of the same micro-batch."""
        # Without slack, the stages behind this one: so many forwards before its first gradient can come back.
        return forwards_ahead(self.slack, depth, k) if self.slack else depth - 1 - k

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = self.ahead(k, depth)
        actions: list[Action] = []
        for i in range(n * m, (n + 1) * m):
            actions.append(Action(ActionKind.F, i))
            if i >= ahead:
                actions += _backward_and_update(i - ahead, m)
        return actions

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = self.ahead(k, depth)
        # Where fewer than `ahead` micro-batches were ever fed, all of them are still in flight.
        return [a for i in range(max(0, n * m - ahead), n * m) for a in _backward_and_update(i, m)]

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return self.ahead(k, depth) + 1

    def warm_up(self, depth: int, m: int) -> int:
        return self.ahead(0, depth) + 1


class GPipe(Order):
    """All forwards, then all backwards, then the update; the pipeline is empty between mini-batches (GPipe, 2019)."""

    name = "gpipe"
    flushes = True

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        batch = range(n * m, (n + 1) * m)
        return [Action(ActionKind.F, i) for i in batch] + [a for i in batch for a in _backward_and_update(i, m)]

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        return []

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return m


class OneFOneBFlush(Order):
    """1F1B inside a mini-batch, flushed at its end (DAPPLE; PipeDream-Flush): the bubble of GPipe, D-k activations."""

    name = "1f1b"
    flushes = True

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        ahead = min(depth - 1 - k, m)  # no more micro-batches than the mini-batch has: it is flushed at its end
        first, end = n * m, (n + 1) * m
        actions = [Action(ActionKind.F, i) for i in range(first, first + ahead)]
        for i in range(first + ahead, end):
            actions += [Action(ActionKind.F, i), *_backward_and_update(i - ahead, m)]
        return actions + [a for i in range(end - ahead, end) for a in _backward_and_update(i, m)]

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        return []

    def in_flight(self, k: int, depth: int, m: int) -> int:
        return min(depth - k, m)


@dataclass(frozen=True)
class AsyncInterleaved(Order):
    """1F1B that never flushes with several stages per process: stage k lives on process ``k mod P``.

    Each process works in *slots*, one forward and then one backward. With V stages per process and groups of g micro-batches
    (g = 1 up to 3 processes), micro-batch i has, on stage ``v * P + p`` of process p,

    - its F in slot ``base(i) + v * g``, where ``base(i) = (i // g) * g * V + i % g``,
    - its B in slot ``base(i) + (V-1) * g + (V-1-v) * c + P-1-p``, c the smallest multiple ``c' * g >= P`` with c' and V coprime.

    So every slot of a process holds exactly one F and one B. It cannot deadlock: in the order (slot, F before B, process) every
    action comes after those that it needs. With V = 1 it is :class:`AsyncOneFOneB`. Groups give an activation the time to go round
    all processes when a backward takes twice as long as a forward; where M has no divisor of ``P / 3`` or more, processes wait.

    With slack x an activation has (1 + x) times as long for each hop: ``P-1-p`` becomes ``ceil((1 + x) (P-1-p))``, and P becomes
    ``ceil((1 + x) P)`` where g and c are chosen.

    Args:
        processes: P; None for one stage per process.
        slack: x.
    """

    processes: int | None = None
    slack: Slack = 0.0
    name: ClassVar[str] = "async_interleaved"
    flushes: ClassVar[bool] = False
    interleaves: ClassVar[bool] = True

    def on_processes(self, processes: int) -> AsyncInterleaved:
        return replace(self, processes=processes)

    def with_slack(self, slack: Slack) -> AsyncInterleaved:
        if isinstance(slack, tuple) and self.processes is not None:
            raise ConfigError(
                f"slack is {slack}, must be a single number where several stages share a process: all rounds of stages pass over the "
                "same links, in slots that leave each of them the same time"
            )
        return replace(self, slack=slack)

    def warm_up(self, depth: int, m: int) -> int:
        shape = self._slots(depth, m)
        # Mini-batches until the longest lag between F and B is over.
        return max(depth, 1 + -(-shape.lag(0, 0) // (m * shape.v)))

    def _slots(self, depth: int, m: int) -> _Slots:
        return _Slots(self.processes or depth, depth, m, self.slack)

    def process_step(self, p: int, depth: int, m: int, n: int) -> list[tuple[int, Action]]:
        shape = self._slots(depth, m)
        slots = range(n * m * shape.v, (n + 1) * m * shape.v)
        # F first: on the last stage the B of a slot is that of the same micro-batch.
        return [a for q in slots for a in [*shape.forward(p, q), *shape.backward(p, q)]]

    def process_drain(self, p: int, depth: int, m: int, n: int) -> list[tuple[int, Action]]:
        shape = self._slots(depth, m)
        first = n * m * shape.v
        slots = range(first, first + shape.lag(0, 0) + 1)  # stage 0 has the longest lag, so nothing is left after it
        return [(k, a) for q in slots for k, a in shape.backward(p, q, before=n * m)]

    def step(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        # Derived from the process's list, so the two cannot disagree on the order.
        return [a for j, a in self.process_step(k % (self.processes or depth), depth, m, n) if j == k]

    def drain(self, k: int, depth: int, m: int, n: int) -> list[Action]:
        return [a for j, a in self.process_drain(k % (self.processes or depth), depth, m, n) if j == k]


class _Slots:
    """The arithmetic of :class:`AsyncInterleaved`."""

    def __init__(self, processes: int, depth: int, m: int, slack: Slack = 0.0) -> None:
        self.processes, self.v, self.m, self.slack = processes, depth // processes, m, slack
        # As of a stage before all P processes: so many slots the round trip of an activation or a gradient may take.
        trip = forwards_ahead(slack, processes + 1, 0) if isinstance(slack, float) else processes
        # The round trip of an activation over all processes takes P forwards; meanwhile a process has g slots of F and B, 3 units each.
        enough = [g for g in range(1, m + 1) if m % g == 0 and 3 * g >= trip]
        self.g = enough[0] if enough else m
        if self.v == 1:
            self.g = 1  # activations make no round trip
        # Coprime to V, so that the backwards of the V stages of a process never fall into the same slot.
        self.c = next(c for c in count(self.g, self.g) if c >= trip and gcd(c // self.g, self.v) == 1)

    def lag(self, v: int, p: int) -> int:
        """Slots from ``base(i)`` to the backward of micro-batch i."""
        return (self.v - 1) * self.g + (self.v - 1 - v) * self.c + forwards_ahead(self.slack, self.processes, p)

    def forward(self, p: int, q: int) -> list[tuple[int, Action]]:
        """The F in slot ``q`` of process ``p``."""
        block, rest = divmod(q, self.g * self.v)
        v, j = divmod(rest, self.g)
        return [(v * self.processes + p, Action(ActionKind.F, block * self.g + j))]

    def backward(self, p: int, q: int, before: int | None = None) -> list[tuple[int, Action]]:
        """The B in slot ``q``, with its U; none in the warm-up, and none of micro-batches from ``before`` on."""
        # At most one v matches, by the choice of c.
        for v in range(self.v):
            block, j = divmod(q - self.lag(v, p), self.g * self.v)
            i = block * self.g + j
            # Negative blocks: the slot lies before the first backward of this stage.
            if block >= 0 and j < self.g and (before is None or i < before):
                return [(v * self.processes + p, a) for a in _backward_and_update(i, self.m)]
        return []


ORDERS: Mapping[str, Order] = MappingProxyType(
    {o.name: o for o in (AsyncOneFOneB(), AsyncInterleaved(), GPipe(), OneFOneBFlush())}
)
