"""What failures cost: devices fail at random, and each failure takes the recovery and the work since the last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite

import numpy as np

from pipeoptim.errors import ConfigError, counted

MOST_SEGMENTS = 1_000_000
"""Of the work between two checkpoints, in a run: of 200 draws a few seconds."""

MOST_ATTEMPTS = 2_000_000
"""At these segments, in a run, on average."""

MOST_EXPONENT = 30.0
"""Failures in one segment, on average, above which no run is expected to get through one."""

MOST_SINGLE = 10_000
"""Failures of a run that are drawn one by one; the time that more of them took is drawn from the normal distribution of their sum."""


@dataclass(frozen=True)
class Failures:
    """How devices fail, and what a failure takes.

    Attributes:
        mtbf: seconds between two failures of one device, on average.
        recovery: seconds from a failure until training goes on.
        checkpoint_every: seconds of work between two checkpoints; what was done since the last one is done again.
        checkpoint: seconds that one takes, in which nothing is trained.
    """

    mtbf: float
    recovery: float
    checkpoint_every: float
    checkpoint: float = 0.0

    def __post_init__(self) -> None:
        for what, value, least in (
            ("mtbf", self.mtbf, None),
            ("recovery", self.recovery, 0),
            ("checkpoint_every", self.checkpoint_every, None),
            ("checkpoint", self.checkpoint, 0),
        ):
            if not isfinite(value) or value < 0 or (least is None and value == 0):
                raise ConfigError(f"{what} is {value:g} s, must be a number {'above' if least is None else 'of at least'} 0")


def useful_shares(failures: Failures, devices: int, seconds: float, draws: int = 200, seed: int = 0) -> list[float]:
    """Share of the time that trains for good in runs of ``seconds`` of such work, one per draw, ascending.

    Work proceeds from checkpoint to checkpoint. Failures come at random, exponentially distributed, at any time but during a recovery;
    one throws the work back to the last checkpoint.

    Example:
        >>> useful_shares(Failures(mtbf=1e12, recovery=60, checkpoint_every=900, checkpoint=100), devices=8, seconds=9000)[0]
        0.9
    """
    random = np.random.default_rng(seed)
    segment = failures.checkpoint_every + failures.checkpoint
    segments = max(1, round(min(seconds / failures.checkpoint_every, 2.0 * MOST_SEGMENTS)))
    if segments > MOST_SEGMENTS:
        raise ConfigError(
            f"a run of {seconds:g} s with a checkpoint every {failures.checkpoint_every:g} s has more than "
            f"{counted(MOST_SEGMENTS, 'checkpoint')}; make checkpoints less often"
        )
    rate = devices / failures.mtbf
    success = np.exp(-rate * segment)
    if success * MOST_ATTEMPTS < segments:
        raise ConfigError(
            f"{devices} devices with an MTBF of {failures.mtbf / 3600:g} h fail so often that no checkpoint, every "
            f"{failures.checkpoint_every:g} s, is reached in a reasonable time; make checkpoints more often"
        )
    return sorted(segments * failures.checkpoint_every / _seconds_of(failures, rate, segments, random) for _ in range(draws))


def seconds_with_failures(failures: Failures, rate: float, seconds: float, random: np.random.Generator | None = None) -> float:
    """How long a run of ``seconds`` of work takes, checkpoints, failures and lost work included; infinite where it does not end.

    Args:
        rate: failures per second, of all devices together; goes before ``failures.mtbf``.
        random: draws one run; None for the mean of all: a segment takes ``(1/rate + recovery) (e^(rate * segment) - 1)`` (Daly, FGCS 2006,
            without failures during a recovery).

    Example:
        >>> seconds_with_failures(Failures(mtbf=1e12, recovery=60, checkpoint_every=900, checkpoint=100), 0.0, 9000)
        10000.0
    """
    segments = max(1, round(seconds / failures.checkpoint_every))
    segment = seconds / segments + failures.checkpoint
    if rate == 0:
        return segments * segment
    if rate * segment > MOST_EXPONENT:
        return inf
    if random is None:
        return segments * (1 / rate + failures.recovery) * float(np.expm1(rate * segment))
    return _seconds_of(replace(failures, checkpoint_every=seconds / segments), rate, segments, random)


def _seconds_of(failures: Failures, rate: float, segments: int, random: np.random.Generator) -> float:
    """One run of so many segments, drawn.

    Attempts that fail before a segment is done: geometric, and their sum negative binomial. How long each lasted: exponential, given that
    it is below the segment.
    """
    segment = failures.checkpoint_every + failures.checkpoint
    success = np.exp(-rate * segment)
    failed = int(random.negative_binomial(segments, success)) if success < 1 else 0
    if failed <= MOST_SINGLE:
        lost = float((-np.log1p(-random.random(failed) * (1 - success)) / rate).sum()) if failed else 0.0
    else:
        odds = success / (1 - success)
        mean, variance = 1 / rate - segment * odds, 1 / rate**2 - segment**2 * odds / (1 - success)
        lost = max(0.0, random.normal(failed * mean, (failed * max(0.0, variance)) ** 0.5))
    return segments * segment + lost + failed * failures.recovery


def best_checkpoint_interval(mtbf: float, devices: int, checkpoint: float) -> float:
    """Young's first-order optimum, ``sqrt(2 * checkpoint * MTBF of the whole)``, valid where it is far below that MTBF (CACM 1974).

    Example:
        >>> best_checkpoint_interval(mtbf=8 * 5e6, devices=8, checkpoint=10.0)
        10000.0
    """
    return float((2 * checkpoint * mtbf / devices) ** 0.5)
