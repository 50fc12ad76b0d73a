"""Each kind of prediction on a model that is linear: where the weight is expected to be s updates from now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from pipeoptim.errors import unknown_name
from pipeoptim.stability.optimizers import LinearOptimizer

Vector = NDArray[Any]


@dataclass
class KnownSoFar:
    """What a stage knows when it predicts; every value is linear in the state, and the learning rate is in the gradients.

    Attributes:
        x: latest weight.
        momentum: after the last step.
        gradient: of the last step.
        partial: sum of the micro-batch gradients of the mini-batch in progress, each already 1/M.
        seen: share of that mini-batch that they are.
    """

    x: Vector
    momentum: Vector
    gradient: Vector
    partial: Vector
    seen: float


Prediction = Callable[[LinearOptimizer, KnownSoFar, int], Vector]


def _none(_: LinearOptimizer, known: KnownSoFar, __: int) -> Vector:
    return known.x


def _last_step(optimizer: LinearOptimizer, known: KnownSoFar, s: int) -> Vector:
    return known.x - s * (optimizer.direct * known.gradient + optimizer.through * known.momentum)


def _paper(optimizer: LinearOptimizer, known: KnownSoFar, s: int) -> Vector:
    direct, through = optimizer.paper or (optimizer.direct, optimizer.through)
    return known.x - s * (direct * known.gradient + through * known.momentum)


def _decayed(optimizer: LinearOptimizer, known: KnownSoFar, s: int) -> Vector:
    left = sum(optimizer.decay**i for i in range(1, s + 1))
    return known.x - left * optimizer.through * known.momentum


def _in_progress(optimizer: LinearOptimizer, known: KnownSoFar, s: int) -> Vector:
    # Without momentum, the micro-batches to come are taken as `seen` times the mean of those so far (rules.estimate).
    missing = known.partial if not optimizer.through else known.momentum * ((1 - optimizer.decay) / optimizer.feed)
    gradient = known.partial + (1 - known.seen) * missing
    momentum = optimizer.decay * known.momentum + optimizer.feed * gradient
    return known.x - s * (optimizer.direct * gradient + optimizer.through * momentum)


PREDICTIONS: dict[str, Prediction] = {
    "none": _none,
    "refined": _last_step,
    "paper": _paper,
    "decayed": _decayed,
    "displacement": _last_step,  # the last displacement is the last step, at a constant learning rate
    "in_progress": _in_progress,
}
"""Kind of prediction -> what it computes, at a constant learning rate and without weight decay."""


def prediction_called(kind: str) -> Prediction:
    """The model of the kind ``kind``.

    Example:
        >>> import numpy as np
        >>> from pipeoptim.stability.optimizers import linear_optimizer
        >>> x, momentum, gradient, partial = np.array([[1.0], [0.2], [0.1], [0.0]])
        >>> known = KnownSoFar(x, momentum, gradient, partial, seen=0.0)
        >>> prediction_called("refined")(linear_optimizer("momentum"), known, 2)
        array([0.6])
    """
    if kind not in PREDICTIONS:
        raise unknown_name("kind of prediction", kind, PREDICTIONS)
    return PREDICTIONS[kind]
