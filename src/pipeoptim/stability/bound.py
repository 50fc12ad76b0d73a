"""The largest learning rate at which a stage converges on a quadratic."""

from __future__ import annotations

import numpy as np

from pipeoptim.stability.linear_stage import LinearStage
from pipeoptim.stability.predictions import Vector

GRID, FINER = 1.1, 24
"""Ratio of neighbouring rates of the first scan; points of each finer one, of which three reach five digits."""

SMALLEST = 1e-6
"""Where the scan begins, as a share of the bound without a gap."""


def spectral_radius(stage: LinearStage, rates: Vector) -> Vector:
    """The largest absolute eigenvalue of one mini-batch at each ``lr * h``: what an error grows by, per mini-batch, in the end."""
    radius: Vector = np.abs(np.linalg.eigvals(stage.transition(rates))).max(axis=1)
    return radius


def largest_stable_rate(stage: LinearStage) -> float:
    """The smallest ``lr * h`` at which the stage does not converge; every smaller one does.

    The spectral radius is no monotone function of the rate, so the first crossing of 1 is searched upwards, on finer and finer grids.

    Example:
        >>> from pipeoptim.schedule import Program
        >>> from pipeoptim.stability.optimizers import linear_optimizer
        >>> round(largest_stable_rate(LinearStage(Program("async_1f1b", 8), 0, linear_optimizer("sgd"))), 4)
        0.2091
    """
    top = 4 * stage.optimizer.synchronous_bound
    count = 1 + int(np.ceil(np.log(4 / SMALLEST) / np.log(GRID)))
    low, high = _first_crossing(stage, np.geomspace(SMALLEST * top / 4, top, count))
    for _ in range(3):
        low, high = _first_crossing(stage, np.geomspace(low, high, FINER))
    return float(np.sqrt(low * high))


def _first_crossing(stage: LinearStage, rates: Vector) -> tuple[float, float]:
    """The neighbours among ``rates`` between which the radius exceeds 1 for the first time."""
    above = spectral_radius(stage, rates) > 1
    first = max(1, int(np.argmax(above)) if above.any() else len(rates) - 1)
    return float(rates[first - 1]), float(rates[first])
