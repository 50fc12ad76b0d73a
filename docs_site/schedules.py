"""The action programs as data for the schedule viewer of the site: what the engine runs, not a second description of it."""

from __future__ import annotations

import json
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.methods import METHODS
from pipeoptim.methods.facts import copies, weight_use
from pipeoptim.methods.method import Method
from pipeoptim.schedule import ORDERS, Program, timeline

DEPTHS = (2, 3, 4, 6, 8)
MICROBATCHES = (1, 2, 4, 8)
SLACK = (0, 1, 2)


def schedules_script() -> str:
    """A script that puts everything into one variable; pages that are opened from the disk may not fetch."""
    return f"const SCHEDULES = {json.dumps(schedules(), separators=(',', ':'))};\n"


def schedules() -> dict[str, Any]:
    """All methods, and the program of each order at each depth D, number of micro-batches M and slack.

    ``spans`` of a program are a line for each stage: its actions in their order, each with its start in units of a forward. ``weights``
    has, where a method differs from what the viewer counts itself, a list for each stage with a number for each micro-batch.
    """
    methods = {
        name: {"order": m.order, "stashes": m.backward.reuses_forward, "about": m.summary} for name, m in METHODS.items()
    }
    programs = {
        f"{order}/{depth}/{m}/{x}": _program(Program(order, depth, m, slack=x))
        for order in dict.fromkeys(method.order for method in METHODS.values())
        for depth in DEPTHS
        for m in MICROBATCHES
        for x in (SLACK[:1] if ORDERS[order].flushes else SLACK)
    }
    return {"depths": DEPTHS, "microbatches": MICROBATCHES, "slack": SLACK, "methods": methods, "programs": programs}


def _program(program: Program) -> dict[str, Any]:
    minibatches = program.warm_up + min(program.warm_up + 2, 4)
    lines: list[list[str]] = [[] for _ in range(program.depth)]
    for span in timeline(program, minibatches):
        lines[span.k].append(f"{span.action}@{span.start:g}")
    fitting = [method for method in METHODS.values() if method.order == program.order and _fits(method, program)]
    return {
        "spans": [" ".join(line) for line in lines],
        "copies": {
            m.name: [copies(m, program.depth, program.microbatches, k, program=program) for k in _stages(program)]
            for m in fitting
        },
        "weights": {m.name: _weights(m, program, range(minibatches * program.microbatches)) for m in fitting},
    }


def _weights(method: Method, program: Program, microbatches: range) -> dict[str, list[list[int]]]:
    """What F and B of a method use, where that is not what follows from the program alone.

    ``gap``: updates from the weights of F to its B, by default those that the program has between them; ``forward``, ``backward``:
    how many updates ahead of the latest weights its prediction is, by default 0.
    """
    told = {
        "gap": [[weight_use(method, program, k).gaps[i] for i in microbatches] for k in _stages(program)],
        "forward": [[method.forward.steps_ahead(program, k, i) for i in microbatches] for k in _stages(program)],
        "backward": [[method.backward.steps_ahead(program, k, i) for i in microbatches] for k in _stages(program)],
    }
    counted = [[program.gap(k, i) for i in microbatches] for k in _stages(program)]
    nothing = [[0 for _ in microbatches] for _ in _stages(program)]
    known = {"gap": counted, "forward": nothing, "backward": nothing}
    left = {what: numbers for what, numbers in told.items() if numbers != known[what]}
    return {what: ([] if numbers == counted else numbers) for what, numbers in left.items()}  # []: the gap itself


def _stages(program: Program) -> range:
    return range(program.depth)


def _fits(method: Method, program: Program) -> bool:
    try:
        method.program(program.depth, program.microbatches, slack=program.slack)
    except ConfigError:
        return False
    return True
