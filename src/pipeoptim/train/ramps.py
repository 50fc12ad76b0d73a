"""Sizes that change in mid-run: how many samples each mini-batch has, and into how many micro-batches it is cut.

``"0:32,1000:64"`` means 32 up to mini-batch 999, and 64 from there on. The data go on where they were: the first mini-batch of the new size
begins behind the samples that were used, at the next whole multiple of its size::

    samples     0 .. 31 | 32 .. 63 | 64 .. 95 |              128 .. 191     | 192 .. 255
    step             0          1          2                      3                 4            with 0:32,3:64
    batch of its size 0          1          2                      2                 3
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from pipeoptim.config import TrainConfig, read_ramp


@dataclass(frozen=True)
class Sizes:
    """What holds from mini-batch ``first`` on.

    Attributes:
        batch_size, microbatches: of each mini-batch.
        first_batch: mini-batch ``first`` is this one of those of its size in the stream of the data.
    """

    first: int
    batch_size: int
    microbatches: int
    first_batch: int

    def batch(self, step: int) -> int:
        """The number of mini-batch ``step`` among those of its size."""
        return self.first_batch + step - self.first


class SizePlan:
    """The sizes of a run.

    Example:
        >>> from pipeoptim.config import Component
        >>> parts = {name: Component("m:f") for name in ("model", "data", "optimizer")}
        >>> plan = SizePlan(TrainConfig("mine", **parts, batch_size_schedule="3:64", microbatches_schedule="0:1,4:8"))
        >>> [(plan.at(n).batch_size, plan.at(n).microbatches, plan.at(n).batch(n)) for n in (2, 3, 4)]
        [(32, 1, 2), (64, 1, 2), (64, 8, 3)]
    """

    def __init__(self, config: TrainConfig) -> None:
        sizes = {0: config.batch_size} | read_ramp(config.batch_size_schedule)
        counts = {0: config.microbatches} | read_ramp(config.microbatches_schedule)
        self.parts: list[Sizes] = []
        samples = 0
        for first in sorted({*sizes, *counts}):
            size, m = (ramp[max(at for at in ramp if at <= first)] for ramp in (sizes, counts))
            if self.parts:
                samples += (first - self.parts[-1].first) * self.parts[-1].batch_size
            place = -(-samples // size)
            samples = place * size
            self.parts.append(Sizes(first, size, m, place))
        self._firsts = [part.first for part in self.parts]

    def at(self, step: int) -> Sizes:
        """Those of mini-batch ``step``."""
        return self.parts[bisect_right(self._firsts, step) - 1]


def parts_of(config: TrainConfig) -> list[TrainConfig]:
    """The configuration as it is in each part of the run, for whoever checks one."""
    return [replace(config, batch_size=part.batch_size, microbatches=part.microbatches) for part in SizePlan(config).parts]
