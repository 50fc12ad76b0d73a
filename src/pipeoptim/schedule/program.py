"""The action program of a whole pipeline, and the version gaps counted from it.

A version gap is never computed by a closed formula: it is the number of ``U`` that a stage's own program holds between
F and B of one micro-batch, so that every order, warm-up and micro-batch count gets its own right gap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from pipeoptim.errors import ConfigError
from pipeoptim.schedule.actions import Action, ActionKind
from pipeoptim.schedule.orders import ORDERS, Order
from pipeoptim.schedule.slack import Slack, check_boundaries, describe_slack, read_slack

MOST_MICROBATCHES = 100_000
"""In D + 1 mini-batches: some seconds of counting for each stage."""


@dataclass(frozen=True)
class Program:
    """What every stage of a pipeline does.

    Args:
        order: a key of :data:`~pipeoptim.schedule.orders.ORDERS`.
        depth: number of stages D, at least 1.
        microbatches: micro-batches M per mini-batch, at least 1.
        processes: P, over which the stages are dealt in turn, stage k to process ``k mod P``; None for one per stage. It
            divides D, and fewer than D need an order that interleaves.
        overlap: move each U behind the next F of its stage, so that gradients can be averaged over replicas while that forward
            runs. That F then sees one update less, which :meth:`gap` counts like any other.
        slack: more micro-batches in flight, so that late messages hold nobody up: a number, or one per boundary between stages.
            Stage k has ``1 + ceil(sum of 1 + x_b over the boundaries b = k .. D-2)`` of them in flight.

    Raises:
        ConfigError: unknown order, a depth or micro-batch count below 1 or beyond counting, or an order that does not work in this way.

    Example:
        >>> p = Program("async_1f1b", depth=3)
        >>> " ".join(map(str, p.full(0, minibatches=4)))
        'F0 F1 F2 B0 U0 F3 B1 U1 B2 U2 B3 U3'
        >>> [p.gap(0, i) for i in range(4)]
        [0, 1, 2, 2]
        >>> [Program("async_1f1b", depth=3, slack=1).in_flight(k) for k in range(3)]
        [5, 3, 1]
    """

    order: str
    depth: int
    microbatches: int = 1
    processes: int | None = None
    overlap: bool = False
    slack: Slack = 0.0

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(f"unknown order {self.order!r}; known: {', '.join(ORDERS)}")
        for what, value in (("depth", self.depth), ("microbatches", self.microbatches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{what} is {value!r}, must be an integer of at least 1")
        object.__setattr__(self, "slack", read_slack(self.slack))
        check_boundaries(self.slack, self.depth)
        if (self.depth + 1) * self.microbatches > MOST_MICROBATCHES:
            fits = MOST_MICROBATCHES // (self.depth + 1)
            remedy = f"microbatches to {fits}" if fits else f"depth to {MOST_MICROBATCHES - 1}"
            raise ConfigError(
                f"depth {self.depth} with {self.microbatches} micro-batches is more than can be counted: gaps are counted over "
                f"2 (depth + 1) mini-batches; set {remedy} or fewer"
            )
        if self.processes is not None:
            self._check_processes(self.processes)
        if self.slack and (self.warm_up + 1) * self.microbatches > MOST_MICROBATCHES:
            raise ConfigError(
                f"slack {describe_slack(self.slack)} at depth {self.depth} with {self.microbatches} micro-batches is more than can be "
                "counted; set slack or microbatches lower"
            )
        if self.overlap and self.flushes:
            raise ConfigError(f"order {self.order!r} has no next forward to overlap with: it flushes; leave overlap out")

    def _check_processes(self, processes: int) -> None:
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1 or self.depth % processes:
            raise ConfigError(f"processes is {processes!r}, must divide the depth of {self.depth}")
        if processes < self.depth and not ORDERS[self.order].interleaves:
            raise ConfigError(
                f"order {self.order!r} has one stage per process, so {self.depth} stages need as many processes, not {processes}"
            )

    @property
    def placed_order(self) -> Order:
        """The order, with its stages dealt to their processes."""
        order = ORDERS[self.order]
        if self.processes:
            order = order.on_processes(self.processes)
        return order.with_slack(self.slack) if self.slack else order

    @property
    def interleaved(self) -> bool:
        """Whether several stages share a process."""
        return self.processes is not None and self.processes < self.depth

    def process_of(self, k: int) -> int:
        """The process that stage ``k`` lives on."""
        return k % (self.processes or self.depth)

    @property
    def flushes(self) -> bool:
        """Whether the pipeline is empty between mini-batches."""
        return self.placed_order.flushes

    @property
    def warm_up(self) -> int:
        """Mini-batches after which what every stage does repeats: from there on gaps have the period of a mini-batch."""
        return self.placed_order.warm_up(self.depth, self.microbatches)

    def step(self, k: int, n: int) -> list[Action]:
        """Actions of stage ``k`` when mini-batch ``n`` (from 0 since the last restart) is fed."""
        self.check_stage(k)
        actions = self.placed_order.step(k, self.depth, self.microbatches, n)
        # What is left over here is what `_postponed` finds again for mini-batch n + 1.
        return _after_next_forward([*self._postponed(k, n), *actions])[0] if self.overlap else actions

    def drain(self, k: int, n: int) -> list[Action]:
        """Actions of stage ``k`` that finish all that is in flight after ``n`` mini-batches were fed."""
        self.check_stage(k)
        # No forward comes any more, so the postponed update is due at once.
        left = self._postponed(k, n) if self.overlap else []
        return left + self.placed_order.drain(k, self.depth, self.microbatches, n)

    def process_step(self, p: int, n: int) -> list[tuple[int, Action]]:
        """Actions of all stages of process ``p`` when mini-batch ``n`` is fed, each with its stage."""
        if not self.interleaved:  # one stage per process: nothing to merge, and this is asked for every mini-batch
            return [(p, action) for action in self.step(p, n)]
        return self._merged(p, self.placed_order.process_step(p, self.depth, self.microbatches, n), lambda k: self.step(k, n))

    def process_drain(self, p: int, n: int) -> list[tuple[int, Action]]:
        """Actions of all stages of process ``p`` that finish all that is in flight after ``n`` mini-batches were fed."""
        if not self.interleaved:
            return [(p, action) for action in self.drain(p, n)]
        return self._merged(p, self.placed_order.process_drain(p, self.depth, self.microbatches, n), lambda k: self.drain(k, n))

    def _merged(self, p: int, base: list[tuple[int, Action]], own: Callable[[int], list[Action]]) -> list[tuple[int, Action]]:
        """The actions of all stages of process ``p``: F and B in the order of ``base``, each U right behind what it follows in ``own``."""
        # The stages of process p: every P-th, beginning with p.
        left = {k: deque(own(k)) for k in range(p, self.depth, self.processes or self.depth)}
        merged: list[tuple[int, Action]] = []
        for k, action in base:
            placed = action.kind is ActionKind.U  # those of ``own`` count: overlap may have moved them
            while not placed:
                merged.append((k, left[k].popleft()))
                placed = merged[-1][1] == action
            while left[k] and left[k][0].kind is ActionKind.U:
                merged.append((k, left[k].popleft()))
        return merged + [(k, action) for k, queue in left.items() for action in queue]

    def _postponed(self, k: int, n: int) -> list[Action]:
        """The U that overlap moves from the step before ``n`` to the next."""
        return _after_next_forward(self.placed_order.step(k, self.depth, self.microbatches, n - 1))[1] if n else []

    def full(self, k: int, minibatches: int) -> list[Action]:
        """The whole program of stage ``k`` for a run of ``minibatches``, drained at the end."""
        self.check_stage(k)
        if self.overlap:
            return [a for n in range(minibatches) for a in self.step(k, n)] + self.drain(k, minibatches)
        # The order is asked once: with 10,000 stages that is half a second of the two that their programs take.
        order, depth, m = self.placed_order, self.depth, self.microbatches
        return [a for n in range(minibatches) for a in order.step(k, depth, m, n)] + order.drain(k, depth, m, minibatches)

    def in_flight(self, k: int) -> int:
        """The most micro-batches between F and B on stage ``k`` at any time."""
        self.check_stage(k)
        return self.placed_order.in_flight(k, self.depth, self.microbatches)

    def gap(self, k: int, i: int) -> int:
        """Version gap s of micro-batch ``i`` on stage ``k``: updates of this stage between its F and its B."""
        table = self._gap_tables.get(k) if type(k) is int else None
        if table is None:
            self.check_stage(k)
            table = self._gap_tables[k] = _gap_table(self, k)
        steady = self._steady
        if i >= steady:  # so that the table is finite
            i = steady + (i - steady) % self.microbatches
        return table[i]

    def steady_gap(self, k: int, microbatch: int = 0) -> int:
        """Version gap of micro-batch ``microbatch`` (0 .. M-1) of every mini-batch once the warm-up is over."""
        return self.gap(k, self._steady + microbatch)

    def version_at_forward(self, k: int, i: int) -> int:
        """Updates that stage ``k`` has made since the last (re)start when it forwards micro-batch ``i``."""
        # Before its B it has made those of all earlier mini-batches.
        return i // self.microbatches - self.gap(k, i)

    @cached_property
    def _gap_tables(self) -> dict[int, dict[int, int]]:
        """Of each stage that was asked for: with every forward, for which finding it by the program's hash would take too long."""
        return {}

    @cached_property
    def _steady(self) -> int:
        """The first micro-batch from which on gaps repeat."""
        # Kept: it is asked for with every forward.
        return self.warm_up * self.microbatches

    def check_stage(self, k: int) -> None:
        """Raises ConfigError where ``k`` is no stage of this pipeline."""
        if isinstance(k, bool) or not isinstance(k, int):
            raise ConfigError(f"k is {k!r}, must be the number of a stage, 0 to {self.depth - 1}")
        if not 0 <= k < self.depth:
            raise ConfigError(f"stage {k} does not exist in a pipeline of depth {self.depth}: use 0 .. {self.depth - 1}")


def _after_next_forward(actions: Iterable[Action]) -> tuple[list[Action], list[Action]]:
    """``actions`` with each U behind the next F, or before the next B if that comes first, and the U that are left."""
    out: list[Action] = []
    held: list[Action] = []
    for action in actions:
        if action.kind is ActionKind.U:
            held.append(action)
        elif action.kind is ActionKind.F:
            out, held = [*out, action, *held], []
        else:  # a backward must not add to gradients that an update is still to use
            out, held = [*out, *held, action], []
    return out, held


def count_gaps(actions: Iterable[Action]) -> dict[int, int]:
    """Version gap of each micro-batch of one stage: the number of ``U`` between its F and its B.

    Example:
        >>> F, B, U = ActionKind.F, ActionKind.B, ActionKind.U
        >>> count_gaps([Action(F, 0), Action(F, 1), Action(B, 0), Action(U, 0), Action(B, 1)])
        {0: 0, 1: 1}
    """
    updates, at_forward, gaps = 0, {}, {}
    for kind, index in actions:
        if kind is ActionKind.U:
            updates += 1
        elif kind is ActionKind.F:
            # The version that this forward sees, counted from the (re)start.
            at_forward[index] = updates
        elif kind is ActionKind.B:
            gaps[index] = updates - at_forward[index]
    return gaps


@lru_cache(maxsize=1024)
def _gap_table(program: Program, k: int) -> dict[int, int]:
    # `gap` looks up the warm-up and one mini-batch more; those behind them keep the drain at the end away.
    return count_gaps(program.full(k, minibatches=2 * program.warm_up + 2))
