"""What a simulation found, as figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeoptim.errors import counted
from pipeoptim.simulate.waits import PathPart, StageWaits, path_words


@dataclass(frozen=True)
class Interval:
    """A figure over all draws: the median, and the bounds of the middle nine tenths."""

    low: float
    median: float
    high: float

    def words(self, digits: int = 4) -> str:
        """The median, and the bounds where they differ."""
        if self.low == self.high:
            return f"{self.median:.{digits}g}"
        return f"{self.median:.{digits}g} ({self.low:.{digits}g} to {self.high:.{digits}g})"


def interval(values: Sequence[float]) -> Interval:
    """Of ``values``.

    Example:
        >>> interval([3.0, 1.0, 2.0]).median
        2.0
    """
    ordered = sorted(values)
    last = len(ordered) - 1
    low, middle, high = (ordered[round(share * last)] for share in (0.05, 0.5, 0.95))
    return Interval(low, middle, high)


@dataclass(frozen=True)
class SimulatedStage:
    """One stage.

    Attributes:
        stage: k.
        blocks: how many it has.
        waits: what its time went to.
        idle: share of its process's time in which no stage of it works.
        in_flight: micro-batches between F and B, at most.
        gap: updates between F and B of a micro-batch, at most.
        copies: of the weights at most, the latest included; None where they were not counted.
        memory: peak bytes; None where copies were not counted.
        activations: bytes of the micro-batches in flight.
    """

    stage: int
    blocks: int
    waits: StageWaits
    idle: float
    in_flight: int
    gap: int
    copies: int | None
    memory: float | None
    activations: float


@dataclass(frozen=True)
class Simulation:
    """What a run would be like.

    Attributes:
        method, depth, microbatches, minibatches, replicas, rows: what was simulated; rows of a mini-batch.
        synthetic: whether the profile is from a formula.
        seconds: of the whole run, with filling and draining the pipeline.
        throughput: mini-batches per second while the pipeline is full, or of the whole run where it never is (``steady`` is False).
        steady: whether the run is long enough for that.
        draws: how many runs with different jitter this is of.
        stages: a row each.
        path: of the critical path of one run, in the time that the throughput is of.
        useful: share of the time that is not lost to failures, in runs of a week or of this length; None where none were asked for.
    """

    method: str
    depth: int
    microbatches: int
    minibatches: int
    replicas: int
    rows: int
    synthetic: bool
    seconds: Interval
    throughput: Interval
    steady: bool
    draws: int
    stages: list[SimulatedStage]
    path: list[PathPart]
    useful: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def sentences(self) -> list[str]:
        """The findings, one per line."""
        found = [
            self._throughput(),
            f"{counted(self.minibatches, 'mini-batch')} take {self.seconds.words()} s, filling and draining included",
        ]
        if self.draws > 1:
            found.append(f"medians of {self.draws} runs with different jitter, and in brackets the middle 90 %")
        if self.useful is not None:
            low, middle, high = (f"{share:.2%}" for share in (self.useful.low, self.useful.median, self.useful.high))
            after = self.throughput.median * self.useful.median
            found.append(f"failures leave {middle} of the time ({low} to {high}) in runs of a week: {after:.4g} mini-batches/s")
        found.append(f"critical path: {path_words(self.path)}")
        wait = self.longest_wait()
        if wait is not None:
            found.append(wait)
        return found

    def _throughput(self) -> str:
        rows = f"{self.throughput.median * self.rows:.4g} rows/s"
        when = (
            ""
            if self.steady
            else f", over the whole run: {counted(self.minibatches, 'mini-batch')} are too few to fill the pipeline"
        )
        return f"{self.throughput.words()} mini-batches/s ({rows}){when}"

    def longest_wait(self) -> str | None:
        """The stage that waits longest for one thing, in words; None where none waits for a hundredth of the time."""
        waits = [
            (share, one.stage, what)
            for one in self.stages
            for share, what in (
                (one.waits.activations, f"activations from {one.stage - 1}"),
                (one.waits.gradients, f"gradients from {one.stage + 1}"),
                (one.waits.replicas, "other replicas"),
            )
        ]
        share, stage, what = max(waits, key=lambda wait: wait[0])
        return (
            f"stage {stage} waits {share:.0%} of the time for {what}, longer than any other stage for one thing"
            if share >= 0.01
            else None
        )
