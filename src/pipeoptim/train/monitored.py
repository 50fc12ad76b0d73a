"""One figure of validations that callbacks watch, and the best value that it had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeoptim.errors import ConfigError

_SMALLER, _LARGER = "min", "max"


@dataclass
class MonitoredFigure:
    """The best of a figure.

    Args:
        name: as in the rows of ``metrics.jsonl``: ``val_loss``, ``val_accuracy``.
        mode: ``"min"`` or ``"max"``: which values are better.
        min_delta: by how much at least.
    """

    name: str = "val_loss"
    mode: str = _SMALLER
    min_delta: float = 0.0
    best: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in (_SMALLER, _LARGER):
            raise ConfigError(f"mode is {self.mode!r}, must be {_SMALLER!r} or {_LARGER!r}")
        if not (isinstance(self.min_delta, int | float) and self.min_delta >= 0):
            raise ConfigError(f"min_delta is {self.min_delta!r}, must be a number of at least 0")

    def improves(self, figures: Mapping[str, float]) -> bool:
        """Whether ``figures`` have a better value than all before, which is the best from here on. One that is not finite is not.

        Raises:
            ConfigError: they do not have this one.
        """
        value = figures.get(self.name)
        if value is None:
            raise ConfigError(f"monitor is {self.name!r}, but validations have {', '.join(figures)}; name one of these")
        if not math.isfinite(value):
            return False
        sign = 1 if self.mode == _SMALLER else -1
        better = self.best is None or sign * (self.best - value) > self.min_delta
        if better:
            self.best = value
        return better
