"""What is simulated: a profile cut into stages, a method with its action program, and the conditions that they run under."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeoptim.errors import ConfigError, counted
from pipeoptim.methods import Method
from pipeoptim.schedule import Program
from pipeoptim.simulate.figures import LEAST, MOST, is_divisor, is_figure
from pipeoptim.simulate.profile import MOST_SPREAD, LinkProfile, Profile

MOST_DRAWS = 1000

MOST_CUT = 5000
"""Blocks whose best cut is looked for: an array over all ranges of them has 200 MB."""

PerBoundary = float | tuple[float, ...]
"""The same on every boundary between two stages, or a number for each of the D-1 boundaries."""


@dataclass(frozen=True)
class Conditions:
    """Devices and links, where they are not as the profile says.

    Attributes:
        delay: seconds from the end of a message's last byte to its arrival; None for the latency of the profile's link.
        bandwidth: bytes per second of a link in each direction; infinite for no limit; None for that of the profile's link.
        jitter: sigma of a log-normal factor on every F and B; None for the profile's spread.
        stragglers: stage -> how many times as long as profiled its actions take.
        draws: how often a run with jitter is simulated, each time with other random factors.
        seed: of the first.
    """

    delay: PerBoundary | None = None
    bandwidth: PerBoundary | None = None
    jitter: float | None = None
    stragglers: Mapping[int, float] = field(default_factory=dict)
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for what, value, most in (("delay", self.delay, MOST), ("jitter", self.jitter, MOST_SPREAD)):
            for one in _numbers(value):
                if not is_figure(one) or one > most:
                    raise ConfigError(f"{what} is {one:g}, must be a number of at least 0 and at most {most:g}")
        for one in _numbers(self.bandwidth):
            if not is_divisor(one):
                raise ConfigError(f"bandwidth is {one:g} bytes per second, must be above 0 (at least {LEAST:g})")
        for k, factor in self.stragglers.items():
            if not is_figure(factor) or not is_divisor(factor):
                raise ConfigError(
                    f"the straggler of stage {k} is {factor:g} times as slow, must be a number above 0, as in {k}:1.5 "
                    f"({LEAST:g} to {MOST:g})"
                )
        if not 1 <= self.draws <= MOST_DRAWS:
            raise ConfigError(f"draws is {self.draws}, must be from 1 to {MOST_DRAWS}")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, must be at least 0")

    def check_depth(self, depth: int) -> None:
        """Raises ConfigError where a straggler is no stage, or a list has not a number for every boundary."""
        for k in self.stragglers:
            if not 0 <= k < depth:
                raise ConfigError(
                    f"the straggler is stage {k}, which a pipeline of {depth} stages does not have; use 0 to {depth - 1}"
                )
        for what, value in (("delay", self.delay), ("bandwidth", self.bandwidth)):
            if isinstance(value, tuple) and len(value) != depth - 1:
                raise ConfigError(
                    f"{what} has {len(value)} numbers, must have one for each of the {depth - 1} boundaries between {depth} stages, or be "
                    "a single number"
                )


def _numbers(value: PerBoundary | None) -> Iterable[float]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class Scenario:
    """A run to simulate.

    Attributes:
        profile: of the model.
        lengths: blocks of each stage.
        method, program: what the stages do.
        minibatches: that are fed before the drain.
        replicas: copies of the pipeline, each for its part of every mini-batch.
        refresh: of predictions from the mini-batch in progress; None for other predictions.
        recompute: "backward" or "forward" where blocks keep their inputs only and run again in B, on its weights or on those of F.
        replica_link: between the replicas of a stage; None where it is as the slowest one between stages.
        conditions: of devices and links.

    Raises:
        ConfigError: the parts do not fit together.
    """

    profile: Profile
    lengths: tuple[int, ...]
    method: Method
    program: Program
    minibatches: int
    replicas: int = 1
    refresh: int | None = None
    recompute: str = ""
    replica_link: LinkProfile | None = None
    conditions: Conditions = Conditions()

    def __post_init__(self) -> None:
        depth = self.program.depth
        if len(self.lengths) != depth or any(length < 1 for length in self.lengths):
            raise ConfigError(f"the cut is {list(self.lengths)}, must be {depth} lengths of at least 1, one per stage")
        if sum(self.lengths) != len(self.profile.blocks):
            raise ConfigError(
                f"the cut has {sum(self.lengths)} blocks, the profile of {self.profile.model} {len(self.profile.blocks)}; give lengths "
                "that add up to them"
            )
        for what, value in (("mini-batches", self.minibatches), ("replicas", self.replicas)):
            if value < 1:
                raise ConfigError(f"{what} is {value}, must be at least 1")
        self.conditions.check_depth(depth)
        parts = self.program.microbatches * self.replicas
        if self.profile.batch_rows % parts:
            raise ConfigError(
                f"the mini-batch of {self.profile.model} has {self.profile.batch_rows} rows, which {self.program.microbatches} "
                f"micro-batches x {self.replicas} replicas do not divide; choose numbers that do"
            )

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.profile.batch_rows // (self.program.microbatches * self.replicas)

    @property
    def actions(self) -> int:
        """Of one replica in the whole run."""
        return self.program.depth * self.minibatches * (2 * self.program.microbatches + 1)

    @property
    def jitter(self) -> float:
        """Sigma of the factor on every F and B."""
        return self.profile.spread if self.conditions.jitter is None else self.conditions.jitter

    @property
    def delay(self) -> PerBoundary:
        """Of messages."""
        return self.profile.link.latency if self.conditions.delay is None else self.conditions.delay

    @property
    def bandwidth(self) -> PerBoundary:
        """Of links; infinite where there is no limit."""
        found = self.profile.link.bandwidth if self.conditions.bandwidth is None else self.conditions.bandwidth
        return float("inf") if found is None else found

    def delays(self) -> list[float]:
        """Of each boundary."""
        return self._each(self.delay)

    def bandwidths(self) -> list[float]:
        """Of each boundary."""
        return self._each(self.bandwidth)

    def average_seconds(self, weight_bytes: float) -> float:
        """Of an average of gradients in a ring over R replicas: 2 (R-1)/R times the bytes over the slowest link, and 2 (R-1) delays."""
        if self.replica_link is None:
            slowest, delay = min(_numbers(self.bandwidth), default=float("inf")), max(_numbers(self.delay), default=0.0)
        else:
            slowest, delay = self.replica_link.bandwidth or float("inf"), self.replica_link.latency
        return 2 * (self.replicas - 1) * (weight_bytes / self.replicas / slowest + delay)

    def _each(self, value: PerBoundary) -> list[float]:
        return list(value) if isinstance(value, tuple) else [value] * (self.program.depth - 1)

    def under(self, **changes: object) -> Scenario:
        """The same under other conditions."""
        return replace(self, conditions=replace(self.conditions, **changes))  # type: ignore[arg-type]


def even_cut(profile: Profile, depth: int, rows: float, speeds: Sequence[float] | None = None) -> tuple[int, ...]:
    """Blocks per stage whose slowest stage is the fastest, by F and B of a micro-batch.

    Raises:
        ConfigError: there are more stages than blocks, or too many blocks.
    """
    blocks = profile.blocks
    if depth == len(blocks):
        return (1,) * depth
    if depth > len(blocks):
        raise ConfigError(
            f"stages is {depth}, but the profile of {profile.model} has {len(blocks)} blocks; use 1 to {len(blocks)}"
        )
    if len(blocks) > MOST_CUT:
        raise ConfigError(
            f"{counted(len(blocks), 'block')} are more than the {MOST_CUT:,} that a cut is looked for of; give the cut"
        )
    from pipeoptim.partitioning.balance import (
        best_cut_by_costs,
    )  # with all of partitioning: a second, where there is something to cut

    seconds = [profile.at(block.forward, rows) + profile.at(block.backward, rows) for block in blocks]
    sums = np.concatenate(([0.0], np.cumsum(seconds)))
    ranges = np.where(np.arange(len(sums)) > np.arange(len(sums))[:, None], sums - sums[:, None], np.inf)

    @cache  # 500 stages of 1,000 blocks would otherwise have 500 arrays of 8 MB
    def at_speed(speed: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ranges / speed
        return found

    return tuple(best_cut_by_costs(len(blocks), depth, lambda k: at_speed(speeds[k] if speeds else 1.0)))
