"""How wrong a prediction s updates ahead is, for gradients that are constant, that drift, and that are noisy.

Let the gradient of update j be ``g + c j + sigma xi_j`` with independent xi of variance 1. The error of the predicted weight is then
linear in g, c and the xi: three numbers for each kind, optimizer and s, in units of the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeoptim.stability.optimizers import LinearOptimizer
from pipeoptim.stability.predictions import KnownSoFar, Vector, prediction_called


@dataclass(frozen=True)
class ErrorTerms:
    """The error of ``W_hat(t+s)``: a mean of ``lr (constant g + drift c)`` with a standard deviation of ``lr noise sigma``.

    On a loss of curvature h a gradient changes by ``c = h lr |dW|`` per update, so that the drift is of order 2 in lr; the others are
    of order 1. In s, ``drift`` grows as s^2, ``constant`` as s, ``noise`` as s for a step that is repeated and as sqrt(s) else.

    Attributes:
        constant: per unit of a constant gradient; positive where the prediction falls short of the way down.
        drift: per unit by which the gradient changes in each update; negative where a momentum that lags behind makes up for something.
        noise: per standard deviation of the gradient of a mini-batch.
    """

    constant: float
    drift: float
    noise: float

    def rms(self, lr: float, gradient: float = 0.0, change: float = 0.0, sigma: float = 0.0) -> float:
        """Root of the mean square of the error."""
        mean = self.constant * gradient + self.drift * change
        return lr * float(np.hypot(mean, self.noise * sigma))


def error_terms(optimizer: LinearOptimizer, kind: str, s: int, seen: float = 0.0) -> ErrorTerms:
    """The error of a prediction ``s`` updates ahead, once the momentum has settled.

    Args:
        optimizer, kind, s: what is predicted how, and how far.
        seen: share of the coming mini-batch whose gradients are known; only "in_progress" uses them.

    Example:
        >>> from pipeoptim.stability.optimizers import linear_optimizer
        >>> sgd = linear_optimizer("sgd")
        >>> error_terms(sgd, "none", 4)
        ErrorTerms(constant=4.0, drift=10.0, noise=2.0)
        >>> round(error_terms(sgd, "refined", 4).noise ** 2, 6)  # 4 steps that come, and 4 times the last one
        20.0
    """
    basis = _Basis(optimizer, s, seen)
    start = KnownSoFar(basis.zero, basis.momentum, basis.last, basis.partial, seen)
    momentum, x = basis.momentum, basis.zero
    for gradient in basis.coming:
        momentum = optimizer.decay * momentum + optimizer.feed * gradient
        x = x - optimizer.direct * gradient - optimizer.through * momentum
    error = prediction_called(kind)(optimizer, start, s) - x
    noise = float(np.sqrt(np.sum(error[:-2] ** 2 * basis.variances)))
    return ErrorTerms(float(error[-2]), float(error[-1]), noise)


class _Basis:
    """Gradients and momentum as vectors over what is independent: old momentum, last, seen, unseen and later noise; then g and c.

    Time 0 is the last update, 1 .. s are those that come; the gradient of time j is ``g + j c`` and noise.
    """

    def __init__(self, optimizer: LinearOptimizer, s: int, seen: float) -> None:
        unit = np.eye(4 + max(0, s - 1) + 2)
        old, last, known, unknown, *later = unit[:-2]
        constant, drift = unit[-2:]
        a, f = optimizer.decay, optimizer.feed
        self.variances = np.array([f**2 / (1 - a**2), 1, seen, 1 - seen] + [1] * len(later))
        self.zero = 0 * constant
        self.last = last + constant
        # The momentum of time -1: geometric sums over the constant and over -1, -2, ...
        before = old + f / (1 - a) * constant - f / (1 - a) ** 2 * drift
        self.momentum: Vector = a * before + f * self.last
        self.partial = known + seen * (constant + drift)
        noise = [known + unknown, *later]
        self.coming = [n + constant + (j + 1) * drift for j, n in enumerate(noise[:s])]


def pays_above(optimizer: LinearOptimizer, kind: str, s: int, seen: float = 0.0) -> float:
    """The ratio of a constant gradient to its noise above which this prediction errs less than none; 0 where it always does.

    Example:
        >>> from pipeoptim.stability.optimizers import linear_optimizer
        >>> pays_above(linear_optimizer("adam", 0.9), "refined", 1), round(pays_above(linear_optimizer("sgd"), "refined", 1), 2)
        (0.0, 1.0)
    """
    own, none = error_terms(optimizer, kind, s, seen), error_terms(optimizer, "none", s)
    more_noise, less_bias = own.noise**2 - none.noise**2, none.constant**2 - own.constant**2
    if more_noise <= 0:
        return 0.0
    return float(np.sqrt(more_noise / less_bias)) if less_bias > 0 else float("inf")
