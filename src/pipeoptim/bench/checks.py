"""Checks that a benchmark is possible, so that one sentence refuses it here instead of every process failing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipeoptim.errors import ConfigError

Numbers = float | Sequence[float] | None
"""One number, some, or none where the benchmark has its own."""


def at_least(least: float, **values: Numbers) -> None:
    """Raises ConfigError for a number below ``least``, infinite or NaN."""
    for name, value in _each(values):
        if not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{name} is {value:g}, must be at least {least:g}")


def at_most(most: float, **values: Numbers) -> None:
    """Raises ConfigError for a number above ``most``."""
    for name, value in _each(values):
        if value > most:
            raise ConfigError(f"{name} is {value:g}, must be at most {most:g}")


def above_zero(**values: Numbers) -> None:
    """Raises ConfigError for a number that is not above 0."""
    for name, value in _each(values):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value:g}, must be above 0")


def runnable(methods: Iterable[str], depths: Sequence[int], microbatches: Sequence[int], slack: str = "0") -> None:
    """Raises ConfigError for a method that is unknown, or not defined at one of the depths with one of the M, or without ``slack``."""
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import read_slack

    for name in methods:
        for depth in depths:
            for m in microbatches:
                get_method(name).program(depth, m, slack=read_slack(slack))


def divide(batches: Sequence[int], **microbatches: Sequence[int] | None) -> None:
    """Raises ConfigError for an M that divides none of the mini-batches, so that it would not be measured."""
    for name, value in _each(microbatches):
        if all(batch % int(value) for batch in batches):
            sizes = " or ".join(map(str, batches))
            raise ConfigError(f"{name} is {value:g}, which does not divide a mini-batch of {sizes}; choose a divisor of it")


def _each(values: dict[str, Numbers] | dict[str, Sequence[int] | None]) -> Iterable[tuple[str, float]]:
    for name, value in values.items():
        numbers = [] if value is None else value if isinstance(value, Sequence) else [value]
        yield from ((name, number) for number in numbers)
