"""Optimizers whose step is linear in the gradients: those that stability can be computed of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeoptim.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class LinearOptimizer:
    """One step: ``m = decay * m + feed * g``, then ``x -= lr * (direct * g + through * m)``.

    Args:
        name: what users type.
        decay: what is left of the momentum after a step, 0 <= decay < 1.
        feed: how much of a gradient enters the momentum.
        direct: how much of a gradient enters the step past the momentum.
        through: how much of the momentum enters the step.
        paper: (direct, through) of the step that the paper's prediction repeats, where that is not the optimizer's own.
    """

    name: str
    decay: float
    feed: float
    direct: float
    through: float
    paper: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        """What a gradient of 1 moves in the end, over all steps that it enters, in units of lr."""
        return self.direct + self.through * self.feed / (1 - self.decay)

    @property
    def synchronous_bound(self) -> float:
        """The largest stable ``lr * h`` without any gap: where ``z = -1`` solves ``(z - 1) + lr h P(z) = 0``."""
        # P(z) = direct + through * feed / (1 - decay / z), at z = -1.
        return 2 / (self.direct + self.through * self.feed / (1 + self.decay))


def _sgd(decay: float) -> LinearOptimizer:
    if decay:
        raise ConfigError(f"momentum is {decay:g}, but sgd has none here: choose momentum (heavy ball) or nesterov")
    return LinearOptimizer("sgd", decay=0, feed=0, direct=1, through=0)


LINEAR_OPTIMIZERS: dict[str, tuple[float, str, Callable[[float], LinearOptimizer]]] = {
    "sgd": (0.0, "plain SGD: x -= lr g", _sgd),
    "momentum": (0.9, "SGD with momentum: m = mu m + g, x -= lr m", lambda mu: LinearOptimizer("momentum", mu, 1, 0, 1)),
    "nesterov": (
        0.9,
        "SGD with Nesterov momentum: m = mu m + g, x -= lr (g + mu m)",
        lambda mu: LinearOptimizer("nesterov", mu, 1, 1, mu, paper=(0, 1)),
    ),
    "adam": (
        0.9,
        "Adam, AdamW with settled second moments: m = beta1 m + (1 - beta1) g, x -= lr m, h in units of sqrt(v)",
        lambda beta1: LinearOptimizer("adam", beta1, 1 - beta1, 0, 1),
    ),
    "nadam": (
        0.9,
        "NAdam likewise: m = beta1 m + (1 - beta1) g, x -= lr (beta1 m + (1 - beta1) g)",
        lambda beta1: LinearOptimizer("nadam", beta1, 1 - beta1, 1 - beta1, beta1),
    ),
}
"""name -> usual decay, formula, and the optimizer for a decay."""


def linear_optimizer(name: str, decay: float | None = None) -> LinearOptimizer:
    """The optimizer ``name`` with momentum ``decay``: mu of SGD, beta1 of Adam.

    Raises:
        ConfigError: no such optimizer, or a decay that is not in [0, 1).

    Example:
        >>> linear_optimizer("momentum", 0.5).synchronous_bound
        3.0
    """
    if name not in LINEAR_OPTIMIZERS:
        raise unknown_name("optimizer", name, LINEAR_OPTIMIZERS, "; the others are not linear in their gradients")
    usual, _, make = LINEAR_OPTIMIZERS[name]
    decay = usual if decay is None else decay
    if not (isinstance(decay, (int, float)) and math.isfinite(decay) and 0 <= decay <= 0.9999):
        raise ConfigError(f"momentum is {decay!r}, must be a number from 0 to 0.9999 (mu of SGD, beta1 of Adam)")
    return make(float(decay))
