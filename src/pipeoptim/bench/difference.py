"""What moved between two results, beyond the noise of both.

The rule: of each row's raw samples a bootstrap (resampling with replacement, 2,000 times, a fixed seed) gives the interval in which
95 % of the ratios of medians, new to old, lie. A row has moved when this interval does not contain 1 **and** the ranges of the
samples do not overlap (every sample of one is above every sample of the other): the first alone calls too much of a few samples
significant, the second alone is blind to how far apart they are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import median

from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.errors import ConfigError

DRAWS = 2000


@dataclass(frozen=True)
class Change:
    """One row in both results: the ratio of medians, new to old, its interval, and whether it counts as moved."""

    name: str
    ratio: float
    low: float
    high: float
    moved: bool


def compare(old: Record, new: Record) -> list[Change]:
    """The rows that both have, in the order of the new one.

    Raises:
        ConfigError: they are results of different benchmarks, or have no row in common.
    """
    if (old.benchmark, old.unit) != (new.benchmark, new.unit):
        raise ConfigError(f"one file is of {old.benchmark} in {old.unit}, the other of {new.benchmark} in {new.unit}")
    before = {row.name: row for row in old.rows}
    found = [_change(before[row.name], row) for row in new.rows if row.name in before]
    if not found:
        raise ConfigError("the two files have no row in common; were they measured with other settings?")
    return found


def _change(old: ResultRow, new: ResultRow) -> Change:
    draw = random.Random(0)

    def once() -> float:
        return median(draw.choices(new.samples, k=len(new.samples))) / median(draw.choices(old.samples, k=len(old.samples)))

    ratios = sorted(once() for _ in range(DRAWS))
    low, high = ratios[int(0.025 * DRAWS)], ratios[int(0.975 * DRAWS) - 1]
    apart = min(new.samples) > max(old.samples) or max(new.samples) < min(old.samples)
    return Change(new.name, new.median / old.median, low, high, apart and not low <= 1.0 <= high)


def differing_machines(old: Record, new: Record) -> list[str]:
    """What of hardware, versions and settings is not the same."""
    parts = [(f"machine's {key}", old.machine.get(key), new.machine.get(key)) for key in sorted({*old.machine, *new.machine})]
    parts += [(key, old.settings.get(key), new.settings.get(key)) for key in sorted({*old.settings, *new.settings})]
    return [f"{name} {a} -> {b}" for name, a, b in parts if a != b]
