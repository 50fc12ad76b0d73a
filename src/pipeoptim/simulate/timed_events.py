"""Everything that happens in a scenario as events of the recurrence: actions, messages on links, averages over replicas.

The actions are those of the scenario's ``Program``, process by process, in the order in which an engine carries them out. To them come

- where links have a bandwidth, a *transmission* per message: each link and direction transmits one message after the other;
- with replicas, the *average* of the gradients of each update::

      replica 0   B . U        . : the gradients of the mini-batch are complete
      replica 1     B .    U   the average begins when all are, and every U waits for its end
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeoptim.errors import ConfigError, counted
from pipeoptim.schedule.actions_table import ActionTable, B, F, U, program_table
from pipeoptim.schedule.recurrence import NOTHING, Events, Numbers, Seconds, in_levels
from pipeoptim.simulate.scenario import Scenario
from pipeoptim.simulate.stage_costs import StageCost, stage_costs

ACTIVATION, GRADIENT, AVERAGE = range(3, 6)
"""Kinds of events beside F, B and U: a message of one of the two kinds on a link, an average over replicas."""

MOST_EVENTS = 20_000_000
"""In about 2 GiB and a minute."""


@dataclass(frozen=True)
class TimedEvents:
    """The events of a scenario and their times without jitter.

    Attributes:
        scenario: what they are of.
        costs: of its stages.
        table: the actions of one replica, which come first: action v of replica r is event ``r * len(table) + v``.
        events: all of them.
        kind, stage: of each event; a message is of the stage that sends it.
        lasts, prepares, arrives: seconds, as in the recurrence.
    """

    scenario: Scenario
    costs: list[StageCost]
    table: ActionTable
    events: Events
    kind: Numbers
    stage: Numbers
    lasts: Seconds
    prepares: Seconds
    arrives: Seconds

    @cached_property
    def varying(self) -> Numbers:
        """The events that jitter: F and B of all replicas."""
        one = np.flatnonzero(self.table.kind != U)
        return (one + np.arange(self.scenario.replicas)[:, None] * len(self.table)).ravel()

    def drawn(self, seeds: range) -> Seconds:
        """Seconds of each event, for each of the seeds of the jitter."""
        lasts = np.repeat(self.lasts[:, None], len(seeds), axis=1)
        if self.scenario.jitter:
            for column, seed in enumerate(seeds):
                normal = np.random.default_rng(seed).standard_normal(len(self.varying))
                lasts[self.varying, column] *= np.exp(self.scenario.jitter * normal)
        return lasts

    def ends(self, lasts: Seconds) -> Seconds:
        """When each event ends."""
        return self.events.ends(lasts, self.prepares, self.arrives)


def timed_events(scenario: Scenario) -> TimedEvents:
    """Everything that happens in ``scenario``.

    Raises:
        ConfigError: it is more than fits into memory.
    """
    program, replicas = scenario.program, scenario.replicas
    count = scenario.actions * replicas
    if count > MOST_EVENTS:
        raise ConfigError(
            f"{counted(count, 'action')} are more than the {MOST_EVENTS:,} that can be simulated; simulate fewer mini-batches: their "
            "times repeat"
        )
    table = program_table(program, scenario.minibatches)
    costs = stage_costs(scenario)
    lasts, prepares = _durations(table, costs, program.microbatches)
    graph = _Graph(
        _tiled(table.before, replicas, len(table)),
        _tiled(table.needs, replicas, len(table)),
        np.tile(table.kind, replicas),
        np.tile(table.stage, replicas),
        np.tile(lasts, replicas),
        np.tile(prepares, replicas),
        np.zeros(len(table) * replicas),
    )
    _send(graph, table, scenario, costs)
    if replicas > 1:
        _average(graph, table, scenario, costs)
    events = in_levels(graph.before, graph.needs)
    return TimedEvents(scenario, costs, table, events, graph.kind, graph.stage, graph.lasts, graph.prepares, graph.arrives)


@dataclass
class _Graph:
    """Events that are still being added."""

    before: Numbers
    needs: Numbers
    kind: Numbers
    stage: Numbers
    lasts: Seconds
    prepares: Seconds
    arrives: Seconds

    def add(self, before: Numbers, needs: Numbers, kind: Numbers | int, stage: Numbers, lasts: Seconds | float) -> None:
        """More events; their numbers follow those that there are."""
        self.kind = np.concatenate((self.kind, np.broadcast_to(kind, len(before)).astype(np.int32)))
        self.stage = np.concatenate((self.stage, stage.astype(np.int32)))
        self.before = np.concatenate((self.before, before.astype(np.int32)))
        self.needs = np.concatenate((self.needs, needs.astype(np.int32)))
        self.lasts = np.concatenate((self.lasts, np.broadcast_to(lasts, len(before))))
        self.prepares, self.arrives = (
            np.concatenate((values, np.zeros(len(before)))) for values in (self.prepares, self.arrives)
        )


def _tiled(numbers: Numbers, replicas: int, count: int) -> Numbers:
    """The same events for every replica."""
    each = numbers + np.arange(replicas, dtype=np.int32)[:, None] * count
    found: Numbers = np.where(numbers == NOTHING, NOTHING, each).astype(np.int32).ravel()
    return found


def _durations(table: ActionTable, costs: list[StageCost], m: int) -> tuple[Seconds, Seconds]:
    """Seconds of every action, and of what it does before it waits for a message: predictions."""
    seconds = np.array([(c.forward, c.backward, c.update) for c in costs])
    predicts = np.zeros((len(costs), 3, m))
    for k, cost in enumerate(costs):
        predicts[k, F], predicts[k, B] = cost.passes.forward, cost.passes.backward
        predicts[k] *= cost.predict
    return seconds[table.stage, table.kind], predicts[table.stage, table.kind, np.where(table.kind == U, 0, table.number % m)]


def _process_of_actions(table: ActionTable) -> Numbers:
    return np.repeat(np.arange(len(table.starts) - 1), np.diff(table.starts))


def _send(graph: _Graph, table: ActionTable, scenario: Scenario, costs: list[StageCost]) -> None:
    """Messages between processes arrive later than they are sent, and wait for one another where the bandwidth is limited."""
    if scenario.program.depth == 1:
        return
    process = _process_of_actions(table)
    takes = np.flatnonzero(table.needs != NOTHING)
    source = table.needs[takes]
    between = process[source] != process[takes]
    takes, source = takes[between], source[between]
    forwards = table.kind[takes] == F
    boundary = np.where(forwards, table.stage[source], table.stage[takes])
    size = np.where(
        forwards, np.array([c.sent_bytes for c in costs])[boundary], np.array([c.returned_bytes for c in costs])[boundary + 1]
    )
    seconds = size / np.array(scenario.bandwidths())[boundary]
    delay = np.array(scenario.delays())[boundary]
    # Chains of transmissions: per link and direction, in the order in which the sender has finished them.
    order = np.lexsort((source, process[takes], process[source]))
    takes, source, seconds, delay = takes[order], source[order], seconds[order], delay[order]
    kind, stage = np.where(table.kind[takes] == F, ACTIVATION, GRADIENT), table.stage[source]
    link = process[source].astype(np.int64) * len(table.starts) + process[takes]
    limited = bool(seconds.any())
    for r in range(scenario.replicas):
        own = r * len(table)
        graph.arrives[takes + own] = delay
        if limited:
            first = len(graph.before)
            before = np.arange(first - 1, first - 1 + len(takes))
            before[np.flatnonzero(np.diff(link, prepend=-1))] = NOTHING
            graph.needs[takes + own] = np.arange(first, first + len(takes))
            graph.add(before, source + own, kind, stage, seconds)


def _average(graph: _Graph, table: ActionTable, scenario: Scenario, costs: list[StageCost]) -> None:
    """Each U waits until the gradients of all replicas are there and their average has gone round."""
    replicas, m, count = scenario.replicas, scenario.program.microbatches, len(table)
    updates = np.flatnonzero(table.kind == U)
    lasts = np.full((table.depth, scenario.minibatches), NOTHING)
    done = np.flatnonzero((table.kind == B) & (table.number % m == m - 1))
    lasts[table.stage[done], table.number[done] // m] = done
    stage = table.stage[updates]
    last = lasts[stage, table.number[updates]]
    complete = []
    for r in range(replicas):  # an event between the last B and what its process does next, for the others to wait for
        complete.append(_insert(graph, last + r * count))
    nothing, chain = np.full(len(updates), NOTHING), np.full(len(updates), NOTHING)
    for r in range(replicas):  # complete on all up to r
        graph.add(chain, complete[r], AVERAGE, stage, 0.0)
        chain = np.arange(len(graph.before) - len(updates), len(graph.before))
    seconds = np.array([scenario.average_seconds(c.weight_bytes) for c in costs])[stage]
    for r in range(replicas):  # averaged, and told to all up to r
        graph.add(chain, nothing, AVERAGE, stage, seconds if r == 0 else 0.0)
        chain = np.arange(len(graph.before) - len(updates), len(graph.before))
        graph.needs[updates + r * count] = chain


def _insert(graph: _Graph, behind: NDArray[np.integer]) -> Numbers:
    """An event of no length behind each of those, before what followed it."""
    first = len(graph.before)
    added = np.arange(first, first + len(behind), dtype=np.int32)
    place = np.full(first, NOTHING, np.int32)
    place[behind] = added
    follows = np.flatnonzero(graph.before != NOTHING)
    moved = follows[place[graph.before[follows]] != NOTHING]
    graph.before[moved] = place[graph.before[moved]]
    graph.add(behind, np.full(len(behind), NOTHING), AVERAGE, graph.stage[behind], 0.0)
    return added
