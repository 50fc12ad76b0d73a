"""The action program of a whole pipeline, and the version gaps counted from it.

A version gap is never computed by a closed formula: it is the number of ``U`` that a stage's own program holds between
F and B of one micro-batch, so that every order, warm-up and micro-batch count gets its own right gap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeoptim.errors import ConfigError
from pipeoptim.schedule.actions import Action, Kind
from pipeoptim.schedule.orders import ORDERS, Order


@dataclass(frozen=True)
class Program:
    """What every stage of a pipeline does.

    Args:
        order: a key of :data:`~pipeoptim.schedule.orders.ORDERS`.
        depth: number of stages D, at least 1.
        microbatches: micro-batches M per mini-batch, at least 1.

    Raises:
        ConfigError: unknown order, or a depth or micro-batch count below 1.

    Example:
        >>> p = Program("async_1f1b", depth=3)
        >>> " ".join(map(str, p.full(0, minibatches=4)))
        'F0 F1 F2 B0 U0 F3 B1 U1 B2 U2 B3 U3'
        >>> [p.gap(0, i) for i in range(4)]
        [0, 1, 2, 2]
    """

    order: str
    depth: int
    microbatches: int = 1

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"unknown order {self.order!r}; known: {', '.join(ORDERS)}")
        for what, value in (("depth", self.depth), ("microbatches", self.microbatches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{what} is {value!r}, must be an integer of at least 1")

    @property
    def rules(self) -> Order:
        """The order's own methods."""
        return ORDERS[self.order]

    @property
    def flushes(self) -> bool:
        """Whether the pipeline is empty between mini-batches."""
        return self.rules.flushes

    def step(self, k: int, n: int) -> list[Action]:
        """Actions of stage ``k`` when mini-batch ``n`` (from 0 since the last restart) is fed."""
        self._check_stage(k)
        return self.rules.step(k, self.depth, self.microbatches, n)

    def drain(self, k: int, n: int) -> list[Action]:
        """Actions of stage ``k`` that finish everything after ``n`` mini-batches were fed."""
        self._check_stage(k)
        return self.rules.drain(k, self.depth, self.microbatches, n)

    def full(self, k: int, minibatches: int) -> list[Action]:
        """The whole program of stage ``k`` for a run of ``minibatches``, drained at the end."""
        fed = [a for n in range(minibatches) for a in self.step(k, n)]
        return fed + self.drain(k, minibatches)

    def in_flight(self, k: int) -> int:
        """The most micro-batches between F and B on stage ``k`` at any time."""
        self._check_stage(k)
        return self.rules.in_flight(k, self.depth, self.microbatches)

    def gap(self, k: int, i: int) -> int:
        """Version gap s of micro-batch ``i`` on stage ``k``: updates of this stage between its F and its B."""
        self._check_stage(k)
        steady = self.depth * self.microbatches  # from here on gaps repeat with the period of a mini-batch
        if i >= steady:
            i = steady + (i - steady) % self.microbatches
        return _gap_table(self, k)[i]

    def steady_gap(self, k: int, microbatch: int = 0) -> int:
        """Version gap of micro-batch ``microbatch`` (0 .. M-1) of every mini-batch once the warm-up is over."""
        return self.gap(k, self.depth * self.microbatches + microbatch)

    def _check_stage(self, k: int) -> None:
        if not 0 <= k < self.depth:
            raise ConfigError(f"stage {k} does not exist in a pipeline of depth {self.depth}: use 0 .. {self.depth - 1}")


def count_gaps(actions: Iterable[Action]) -> dict[int, int]:
    """Version gap of each micro-batch of one stage: the number of ``U`` between its F and its B.

    Example:
        >>> count_gaps([Action(Kind.F, 0), Action(Kind.F, 1), Action(Kind.B, 0), Action(Kind.U, 0), Action(Kind.B, 1)])
        {0: 0, 1: 1}
    """
    updates, at_forward, gaps = 0, {}, {}
    for kind, index in actions:
        if kind is Kind.U:
            updates += 1
        elif kind is Kind.F:
            at_forward[index] = updates
        elif kind is Kind.B:
            gaps[index] = updates - at_forward[index]
    return gaps


@lru_cache(maxsize=1024)
def _gap_table(program: Program, k: int) -> dict[int, int]:
    return count_gaps(program.full(k, minibatches=2 * program.depth + 2))
