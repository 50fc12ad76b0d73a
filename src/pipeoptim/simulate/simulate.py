"""Carry a scenario out in thought: when everything happens, how fast it is, why it is not faster."""

from __future__ import annotations

import numpy as np

from pipeoptim.failures import Failures, useful_shares
from pipeoptim.schedule import ActionKind
from pipeoptim.schedule.actions_table import ActionTable, B, F, U
from pipeoptim.schedule.recurrence import Seconds
from pipeoptim.simulate.result import SimulatedStage, Simulation, interval
from pipeoptim.simulate.scenario import Scenario
from pipeoptim.simulate.timed_events import TimedEvents, timed_events
from pipeoptim.simulate.waits import StageWaits, critical_path, stage_waits

AT_ONCE = 4_000_000
"""Events times draws that are solved together: about 200 MB."""


LONG_RUN = 7 * 86400.0
"""Seconds of the run that failures are drawn for, where the simulated one is shorter: it is a piece of a long one."""


def simulate(scenario: Scenario, failures: Failures | None = None) -> Simulation:
    """When everything in ``scenario`` happens, and what follows.

    Args:
        scenario: what runs.
        failures: of devices, which the throughput is then reduced by.

    Example:
        >>> from pipeoptim.methods import get_method
        >>> from pipeoptim.simulate import Scenario, TransformerSizes, synthetic
        >>> method, profile = get_method("pipeoptim"), synthetic(TransformerSizes(), stages=4)
        >>> found = simulate(Scenario(profile, (1, 1, 1, 1), method, method.program(4, 8), minibatches=20))
        >>> found.steady, found.stages[0].in_flight
        (True, 4)
    """
    return summary(timed_events(scenario), failures)


def summary(timed: TimedEvents, failures: Failures | None = None) -> Simulation:
    """What follows from the events of a scenario."""
    scenario = timed.scenario
    draws = scenario.conditions.draws if scenario.jitter else 1
    at_once = max(1, AT_ONCE // len(timed.events))
    seconds, throughputs, waits = [], [], []
    for first in range(0, draws, at_once):
        seeds = range(scenario.conditions.seed + first, scenario.conditions.seed + min(draws, first + at_once))
        lasts = timed.drawn(seeds)
        ends = timed.ends(lasts)
        for column in range(len(seeds)):
            window, rate = steady_window(timed, ends[:, column])
            seconds.append(float(ends[:, column].max()))
            throughputs.append(rate)
            waits.append(stage_waits(timed, lasts[:, column], ends[:, column], window))
    path = critical_path(timed, lasts[:, -1], ends[:, -1], window)
    length = interval(seconds)
    useful = None
    if failures is not None:
        devices = scenario.replicas * (scenario.program.processes or scenario.program.depth)
        useful = interval(useful_shares(failures, devices, max(length.median, LONG_RUN)))
    return Simulation(
        method=scenario.method.name,
        depth=scenario.program.depth,
        microbatches=scenario.program.microbatches,
        minibatches=scenario.minibatches,
        replicas=scenario.replicas,
        rows=scenario.profile.batch_rows,
        synthetic=scenario.profile.synthetic,
        seconds=length,
        throughput=interval(throughputs),
        steady=_updates_in_steady_state(timed) is not None,
        draws=draws,
        stages=_stages(timed, waits),
        path=path,
        useful=useful,
    )


def _updates_in_steady_state(timed: TimedEvents) -> tuple[int, int] | None:
    """Two updates of stage 0 between which the pipeline is full; None where there are too few mini-batches."""
    program = timed.scenario.program
    fed = sum(action.kind is ActionKind.U for n in range(timed.scenario.minibatches) for action in program.step(0, n))
    first, last = fed // 3, fed - 1  # those of the drain come faster
    return (first, last) if last - first >= 2 else None


def steady_window(timed: TimedEvents, ends: Seconds) -> tuple[tuple[float, float], float]:
    """A span of time in which the pipeline is full, and the mini-batches per second in it; else the whole run."""
    updates = _updates_in_steady_state(timed)
    if updates is None:
        end = float(ends.max())
        return (0.0, end), timed.scenario.minibatches / end if end else float("inf")
    table = timed.table
    own = np.flatnonzero((table.stage == 0) & (table.kind == U))  # in the order of mini-batches
    begin, end = (float(ends[own[n]]) for n in updates)
    return (begin, end), (updates[1] - updates[0]) / (end - begin) if end > begin else float("inf")


def _stages(timed: TimedEvents, waits: list[list[StageWaits]]) -> list[SimulatedStage]:
    program, table = timed.scenario.program, timed.table
    mean = np.array([[(w.busy, w.activations, w.gradients, w.replicas) for w in draw] for draw in waits]).mean(axis=0)
    process = np.array([program.process_of(k) for k in range(program.depth)])
    idle = np.maximum(0.0, 1 - np.bincount(process, mean[:, 0])[process])  # shares add up to 1 but for rounding
    flying, gaps = most_in_flight(table), largest_gaps(table)
    return [
        SimulatedStage(
            stage=k,
            blocks=timed.scenario.lengths[k],
            waits=StageWaits(*mean[k].tolist()),
            idle=float(idle[k]),
            in_flight=flying[k],
            gap=gaps[k],
            copies=cost.copies,
            memory=cost.memory(),
            activations=cost.saved_bytes * flying[k],
        )
        for k, cost in enumerate(timed.costs)
    ]


def most_in_flight(table: ActionTable) -> list[int]:
    """Per stage, the most micro-batches whose F is done and whose B is not."""
    order = np.argsort(table.stage, kind="stable")
    firsts = np.flatnonzero(np.diff(table.stage[order], prepend=-1))
    flying = np.cumsum(np.array([1, -1, 0])[table.kind[order]])  # back to 0 where a stage ends: runs are drained
    return [int(most) for most in np.maximum.reduceat(flying, firsts)]


def largest_gaps(table: ActionTable) -> list[int]:
    """Per stage, the most updates between F and B of a micro-batch."""
    order = np.argsort(table.stage, kind="stable")
    stage, kind, number = table.stage[order], table.kind[order], table.number[order]
    updates = np.cumsum(kind == U)
    at = np.zeros((2, table.depth, int(number.max()) + 1), np.int32)
    for which in (F, B):
        own = kind == which
        at[which, stage[own], number[own]] = updates[own]
    gaps: list[int] = (at[B] - at[F]).max(axis=1).tolist()
    return gaps
