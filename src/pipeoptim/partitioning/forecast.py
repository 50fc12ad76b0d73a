"""What a schedule will reach on stages of known speed, from its action program alone."""

from __future__ import annotations

from collections.abc import Sequence

from pipeoptim.schedule import ActionKind, Program, timeline


def seconds_per_minibatch(program: Program, stage_seconds: Sequence[float]) -> float:
    """Seconds between two mini-batches in steady state.

    Args:
        program: the order of the actions.
        stage_seconds: F and B of a whole mini-batch on each stage; F takes a third of it, a micro-batch its share.

    Example:
        >>> seconds_per_minibatch(Program("async_1f1b", 4), [3.0, 3.0, 3.0, 3.0])
        3.0
        >>> seconds_per_minibatch(Program("gpipe", 4, 1), [3.0, 3.0, 3.0, 3.0])
        12.0
    """
    forward = [s / 3 / program.microbatches for s in stage_seconds]
    backward = [2 * f for f in forward]
    first, last = 2 * program.warm_up, 4 * program.warm_up  # after the warm-up, before the drain
    spans = timeline(program, 6 * program.warm_up, forward, backward)
    updates = {s.action.number: s.end for s in spans if s.k == 0 and s.action.kind is ActionKind.U}
    return (updates[last] - updates[first]) / (last - first)
