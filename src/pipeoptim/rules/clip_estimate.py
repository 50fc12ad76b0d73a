"""What is known, before an update, of how its gradient will be clipped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.rules.move import Scalar


@dataclass(frozen=True, slots=True)
class ClipEstimate:
    """How the gradient of the coming update will be clipped, as far as is known: one of the three.

    Attributes:
        max_norm: limit for the norm of all gradients of the optimizer, by which the estimate is clipped.
        max_norms: a tensor with one limit for each parameter, by which the estimate of each is clipped by its own norm.
        last_factor: what clipping multiplied the gradients of the last update by, where a norm decides that is not known here.

    Raises:
        ConfigError: several are given, max_norm is no number above 0, or max_norms no tensor of one dimension.

    Example:
        >>> round(ClipEstimate(max_norm=1.0).factor(4.0), 5)
        0.25
    """

    max_norm: float | None = None
    last_factor: Scalar | None = None
    max_norms: Tensor | None = None

    def __post_init__(self) -> None:
        limit = self.max_norm
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0):
            raise ConfigError(f"max_norm is {limit!r}, must be a number above 0, for example 1.0")
        if self.max_norms is not None and (not isinstance(self.max_norms, Tensor) or self.max_norms.ndim != 1):
            raise ConfigError(f"max_norms is {self.max_norms!r}, must be a tensor with one number above 0 for each parameter")
        given = [name for name in ("max_norm", "last_factor", "max_norms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"clipping is estimated by {' or by '.join(given)}, not by several: pass max_norm where the update is clipped by the norm "
                "of its own gradients, max_norms where each tensor is by its own, else last_factor"
            )

    def factor(self, norm: Scalar) -> Scalar:
        """What gradients of this norm are multiplied by, as ``clip_grad_norm_`` does."""
        assert self.max_norm is not None
        if isinstance(norm, Tensor):  # not read: that would wait for a device
            return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = self.max_norm / (norm + 1e-6)
        return 1.0 if factor >= 1.0 else factor  # so that what is not a number stays so

    def own_factor(self, n: int, norm: Scalar) -> Scalar:
        """What the gradient of parameter ``n`` is multiplied by where its norm is this."""
        assert self.max_norms is not None
        if isinstance(norm, Tensor):
            return (self.max_norms[n].to(norm.device) / norm).clamp(max=1.0)
        limit = float(self.max_norms[n])
        return 1.0 if norm <= limit else limit / norm
