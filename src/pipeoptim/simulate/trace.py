"""A simulated run as a trace: the same files and pictures as of a run that was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeoptim.errors import ConfigError, counted
from pipeoptim.schedule.actions_table import KINDS, B, F
from pipeoptim.simulate.scenario import Scenario
from pipeoptim.simulate.timed_events import TimedEvents
from pipeoptim.telemetry.trace.chrome import to_chrome
from pipeoptim.telemetry.trace.picture import picture
from pipeoptim.telemetry.trace.read import StageTrace, TraceSpan
from pipeoptim.telemetry.trace.shares import ideal, shares

MOST_TRACED = 200_000
"""Actions: a file of about 50 MB, which Perfetto still opens."""

TITLE = "simulated"


def check_traceable(scenario: Scenario) -> None:
    """Before anything of ``scenario`` is simulated.

    Raises:
        ConfigError: its trace would be more than a viewer opens.
    """
    if scenario.actions > MOST_TRACED:
        raise ConfigError(
            f"a trace of {counted(scenario.actions, 'action')} is more than viewers open ({MOST_TRACED:,}); simulate fewer mini-batches or "
            "stages"
        )


def stage_traces(timed: TimedEvents) -> list[StageTrace]:
    """What every stage of the first replica does in the first draw, in nanoseconds.

    Raises:
        ConfigError: that is more than a viewer opens.
    """
    scenario, table = timed.scenario, timed.table
    check_traceable(scenario)
    seed = scenario.conditions.seed
    lasts = timed.drawn(range(seed, seed + 1))[:, 0]
    ends = timed.ends(lasts)
    begins = timed.events.begins(ends, timed.prepares, timed.arrives)
    before = timed.events.before[: len(table)]
    free = np.where(before < 0, 0.0, ends[before])
    spans: list[list[TraceSpan]] = [[] for _ in range(table.depth)]
    columns = (free, free + timed.prepares[: len(table)], begins[: len(table)], ends[: len(table)])
    for v, (idle, ready, begin, end) in enumerate(
        zip(*((1e9 * one).round().astype(int).tolist() for one in columns), strict=True)
    ):
        k, number = int(table.stage[v]), int(table.number[v])
        if ready > idle:
            spans[k].append(TraceSpan("predict", number, idle, ready))
        if begin > ready:
            peer = k + {F: -1, B: 1}.get(int(table.kind[v]), -1 - k)  # of a U: all replicas
            spans[k].append(TraceSpan("wait", -1, ready, begin, peer))
        spans[k].append(TraceSpan(KINDS[table.kind[v]].value, number, begin, end))
    program = scenario.program
    return [
        StageTrace(
            k,
            table.depth,
            program.microbatches,
            program.order,
            scenario.method.name,
            TITLE,
            k,
            program.process_of(k),
            tuple(own),
        )
        for k, own in enumerate(spans)
    ]


def chrome_trace(stages: list[StageTrace]) -> dict[str, Any]:
    """For Perfetto: the simulated run, and below it the same actions where messages take no time."""
    return to_chrome(stages, ideal(stages), shares(stages), TITLE)


def drawing(stages: list[StageTrace]) -> str:
    """Some mini-batches of the simulated run as an SVG."""
    return picture(stages, ideal(stages), TITLE)
