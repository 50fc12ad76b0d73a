"""What a user decides and no source can say: how long hardware is used, how much of the time, by how many people."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from pipeoptim.errors import ConfigError
from pipeoptim.money.triangular import Triangular

RECOVERY = Triangular(60.0, 300.0, 1800.0)
"""Seconds, where nothing else is said: from a replaced process to a machine that has to be found and started."""


@dataclass(frozen=True)
class Terms:
    """The terms of an estimate.

    Attributes:
        accelerator: whose prices each device of the plan has.
        life: years in which own hardware is written off.
        utilisation: share of its time in which own hardware, or a server reserved for a year, is used at all.
        people: who look after the run while it lasts; None for unknown.
        stored, sent: GB of data that are kept for the run, and that leave the cloud, beside its checkpoints.
        kept_checkpoints: that are stored at a time.
        recovery: seconds from a failure until training goes on.
        checkpoint_every, checkpoint: seconds of work between two checkpoints, and seconds that one takes.
        own_stages: of the mix, the first stages, that run on own hardware; None for half of them.

    Raises:
        ConfigError: a figure that cannot be.
    """

    accelerator: str = "h100"
    life: float = 5.0
    utilisation: float = 0.7
    people: float | None = None
    stored: float = 0.0
    sent: float = 0.0
    kept_checkpoints: int = 2
    recovery: Triangular = RECOVERY
    checkpoint_every: float = 600.0
    checkpoint: float = 0.0
    own_stages: int | None = None

    def __post_init__(self) -> None:
        for what, value, above, most in (
            ("life", self.life, True, 50.0),
            ("utilisation", self.utilisation, True, 1.0),
            ("people", self.people or 0.0, False, 1e6),
            ("stored", self.stored, False, 1e12),
            ("sent", self.sent, False, 1e12),
            ("kept_checkpoints", self.kept_checkpoints, False, 1e6),
            ("recovery", self.recovery.low, False, 1e7),
            ("recovery", self.recovery.high, False, 1e7),
            ("checkpoint_every", self.checkpoint_every, True, 1e9),
            ("checkpoint", self.checkpoint, False, 1e7),
        ):
            if not isfinite(value) or not 0 <= value <= most or (above and value == 0):
                raise ConfigError(f"{what} is {value:g}, must be {'above' if above else 'at least'} 0 and at most {most:g}")
        if not self.recovery.low <= self.recovery.typical <= self.recovery.high:
            raise ConfigError(
                f"recovery is {self.recovery.low:g},{self.recovery.high:g}, must be the least and the most seconds: 60,1800"
            )
