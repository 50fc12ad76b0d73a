"""A run whose stages were timed, and what that says about where to cut its model: ``pipeoptim plan --from-run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeoptim.config import TrainConfig, read_cut
from pipeoptim.engine.stage_times import StageTimes
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning import BlockCost
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.telemetry.timing import TIMED_EVERY, times_of
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.setup import cut_lengths
from pipeoptim.train.trust import check_trusted


@dataclass(frozen=True)
class MeasuredRun:
    """A run, how many blocks each of its stages has, and what each took lately."""

    path: Path
    config: TrainConfig
    lengths: tuple[int, ...]
    times: tuple[StageTimes, ...]

    def speeds(self, costs: Sequence[BlockCost], stages: int | None) -> list[float]:
        """How fast the device of each stage is beside the fastest: what its blocks cost here, over what the stage took.

        Raises:
            ConfigError: another number of stages is wanted, of whose devices nothing is known.
        """
        if stages != len(self.lengths):
            raise ConfigError(
                f"stages is {stages}, but run {self.path} timed {len(self.lengths)} stages and tells nothing of others; leave --stages out"
            )
        starts = [sum(self.lengths[:k]) for k in range(len(self.lengths))]
        expected = [
            sum(cost.seconds for cost in costs[start : start + length])
            for start, length in zip(starts, self.lengths, strict=True)
        ]
        found = [seconds / max(one.computing, 1e-9) for seconds, one in zip(expected, self.times, strict=True)]
        return [speed / max(found) for speed in found]

    def advice(self, lengths: Sequence[int]) -> str:
        """What to do with a new cut into ``lengths``."""
        took = ", ".join(f"{1e3 * one.computing:.3g}" for one in self.times)
        told = f"in run {self.path} the stages of {_written(self.lengths)} blocks took {took} ms per mini-batch"
        if tuple(lengths) == self.lengths:
            return f"{told}: no other cut is faster"
        return f"{told}; to go on with the new cut: pipeoptim train --resume --name {self.path.name} --cut {_written(lengths)}"


def read_measured_run(path: Path) -> MeasuredRun:
    """The run in the folder ``path``.

    Raises:
        ConfigError: there is none, it names functions that nobody has named here, or it was too short to be timed.
    """
    directory = RunDir(path)
    config = directory.read_config()
    check_trusted(path, config)
    rows = [row["timing"] for row in read_rows(directory.metrics) if "timing" in row]
    times = tuple(times_of(rows[-1])) if rows else ()
    if [one.stage for one in times] != list(range(config.stages)):
        raise ConfigError(
            f"run {path} has no times of its stages, which are written every {TIMED_EVERY} mini-batches; train it further"
        )
    return MeasuredRun(path, config, read_cut(config.cut) or cut_lengths(config), times)


def _written(lengths: Sequence[int]) -> str:
    return ",".join(map(str, lengths))
