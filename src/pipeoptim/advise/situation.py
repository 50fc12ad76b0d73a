"""What a user has and wants: the input of every decision."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pipeoptim.errors import ConfigError

NOT_LATE = 0.02
"""Times of a stage that cost no more than slack would."""

MOST_SLACK = 8
"""What is advised at most: messages later than four stage times each way call for another link, or for longer stages."""


@dataclass(frozen=True)
class Situation:
    """What is known; None stands for unknown.

    Args:
        stages: D.
        microbatches: M; None if it may be chosen.
        most_microbatches: the largest M that may be chosen, for instance the rows of a mini-batch.
        optimizer: its name, for figures of it.
        momentum: mu or beta1, 0 for none.
        copies: of the weights for which a device has room, the latest included.
        exact: whether the result must equal that of synchronous training.
        relative_error: of the predicted displacements of a measured run; 1 is what no prediction would have had.
        slowest: time of the slowest stage of a measured run over the mean of all.
        late: by how many times of a stage's forward and backward messages come late.

    Raises:
        ConfigError: a number that makes no sense.
    """

    stages: int
    microbatches: int | None = None
    most_microbatches: int | None = None
    optimizer: str = "adamw"
    momentum: float | None = None
    copies: int | None = None
    exact: bool = False
    relative_error: float | None = None
    late: float | None = None
    slowest: float | None = None

    def __post_init__(self) -> None:
        for name in ("stages", "microbatches", "most_microbatches", "copies"):
            value = getattr(self, name)
            if (value is not None or name == "stages") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}, must be an integer of at least 1")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum is {self.momentum!r}, must be at least 0 and below 1")
        if self.late is not None and not 0 <= self.late < float("inf"):
            raise ConfigError(f"late is {self.late!r}, must be a number of at least 0, in times of a stage")

    @property
    def slack(self) -> int:
        """The least that hides messages as late as these: 2d on every boundary, for d stage times one way (docs/performance.md)."""
        return 0 if self.exact or self.late is None or self.late <= NOT_LATE else min(ceil(2 * self.late), MOST_SLACK)

    @property
    def ahead(self) -> int:
        """Micro-batches that the first stage forwards before its first backward: with as many in a mini-batch the gap is one update."""
        return (1 + self.slack) * (self.stages - 1)

    @property
    def m(self) -> int:
        """M: as given, or what makes the gap one update where that is possible, or as near to it as it is."""
        if self.microbatches is not None:
            return self.microbatches
        wanted = max(self.stages, self.ahead)
        return wanted if self.most_microbatches is None else min(wanted, self.most_microbatches)

    def has_room(self, copies: int, unknown: bool) -> bool:
        """Whether so many copies of the weights fit; ``unknown`` where nothing is known of that."""
        return unknown if self.copies is None else self.copies >= copies
