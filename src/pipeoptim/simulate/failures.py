"""What failures cost: devices fail at random, and each failure takes the recovery and the work since the last checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import numpy as np

from pipeoptim.errors import ConfigError, counted

MOST_SEGMENTS = 1_000_000
"""Of the work between two checkpoints, in a run: of 200 draws a few seconds."""

MOST_ATTEMPTS = 2_000_000
"""At these segments, in a run, on average."""


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
    # Attempts that fail before a segment is done: geometric. How long each lasted: exponential, given that it is below the segment.
    success = np.exp(-rate * segment)
    if success * MOST_ATTEMPTS < segments:
        raise ConfigError(
            f"{devices} devices with an MTBF of {failures.mtbf / 3600:g} h fail so often that no checkpoint, every "
            f"{failures.checkpoint_every:g} s, is reached in a reasonable time; make checkpoints more often"
        )
    shares = []
    for _ in range(draws):
        failed = int((random.geometric(success, segments) - 1).sum())
        lost = -np.log1p(-random.random(failed) * (1 - success)) / rate
        total = segments * segment + float(lost.sum()) + failed * failures.recovery
        shares.append(segments * failures.checkpoint_every / total)
    return sorted(shares)


def best_checkpoint_interval(mtbf: float, devices: int, checkpoint: float) -> float:
    """Young's first-order optimum, ``sqrt(2 * checkpoint * MTBF of the whole)``, valid where it is far below that MTBF (CACM 1974).

    Example:
        >>> best_checkpoint_interval(mtbf=8 * 5e6, devices=8, checkpoint=10.0)
        10000.0
    """
    return float((2 * checkpoint * mtbf / devices) ** 0.5)
