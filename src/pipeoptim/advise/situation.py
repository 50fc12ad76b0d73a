"""What a user has and wants: the input of every decision."""

from __future__ import annotations

from dataclasses import dataclass

from pipeoptim.errors import ConfigError


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
    def m(self) -> int:
        """M: as given, or D where that is possible, or as near to it as it is."""
        if self.microbatches is not None:
            return self.microbatches
        return self.stages if self.most_microbatches is None else min(self.stages, self.most_microbatches)

    def has_room(self, copies: int, unknown: bool) -> bool:
        """Whether so many copies of the weights fit; ``unknown`` where nothing is known of that."""
        return unknown if self.copies is None else self.copies >= copies
