"""What is known, before an update, of how its gradient will be clipped."""

from __future__ import annotations

from dataclasses import dataclass

from pipeoptim.errors import ConfigError
from pipeoptim.rules.move import Scalar


@dataclass(frozen=True, slots=True)
class ClipEstimate:
    """How the gradient of the coming update will be clipped, as far as is known: one of the two.

    Attributes:
        max_norm: limit for the norm of all gradients of the optimizer, by which the estimate is clipped.
        last_factor: what clipping multiplied the gradients of the last update by, where a norm decides that is not known here.

    Raises:
        ConfigError: both are given, or max_norm is no number above 0.

    Example:
        >>> round(ClipEstimate(max_norm=1.0).factor(4.0), 5)
        0.25
    """

    max_norm: float | None = None
    last_factor: Scalar | None = None

    def __post_init__(self) -> None:
        limit = self.max_norm
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
            raise ConfigError(f"max_norm is {limit!r}, must be a number above 0, for example 1.0")
        if self.max_norm is not None and self.last_factor is not None:
            raise ConfigError(
                f"clipping is estimated by max_norm={self.max_norm:g} or by last_factor={self.last_factor}, not by both: pass max_norm "
                "where the update is clipped by the norm of its own gradients, else last_factor"
            )

    def factor(self, norm: float) -> float:
        """What gradients of this norm are multiplied by, as ``clip_grad_norm_`` does."""
        assert self.max_norm is not None
        factor = self.max_norm / (norm + 1e-6)
        return 1.0 if factor >= 1.0 else factor  # so that what is not a number stays so
