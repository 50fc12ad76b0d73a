"""Prediction by the last displacement, in the one buffer that an engine has for it.

All points ``W_t + h * d`` with ``d = W_t - W_{t-1}`` lie on one line, so any one of them but W_t itself is enough to find every
other. ``h = -1`` is W_{t-1}, and a prediction for s updates is ``h = s``: it may overwrite the point that it was made from, and the
next one starts from there. So two copies of the weights are enough, the latest included.

    before_step: buffer = W_t      after the step: W_t is W_{t-1}, h = -1      predict s: buffer = W_t + s d, h = s
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError
from pipeoptim.rules.entries import ParameterEntry
from pipeoptim.rules.fallback import copy_weights

PREVIOUS = -1.0
"""Where the previous weights lie on the line ``W_t + h * (W_t - W_{t-1})``."""

Buffers = list[Tensor | None]


@torch.no_grad()
def extrapolate(weight: Tensor, point: Tensor, position: float, distance: float, out: Tensor) -> None:
    """Write ``W + distance * d`` into `out`, given `point` = ``W + position * d``, d = the last displacement.

    ``position = -1`` is the previous weights. `out` may be `point` itself. One lerp, no temporary.
    """
    torch.lerp(point, weight, 1.0 - distance / position, out=out.detach())


class DisplacementMemory:
    """A point on the line of each parameter that is predicted by displacement.

    Attributes:
        points: one per parameter of the optimizer, None for parameters that are predicted otherwise; None altogether while no
            displacement is known. They are the engine's buffers, not copies, except after a resume.
        position: where on their lines the points lie.
    """

    def __init__(self) -> None:
        self.points: Buffers | None = None
        self.position = PREVIOUS
        self._private = False  # points of our own, from a resume: dropped once the engine's buffers hold points as well

    def forget(self) -> None:
        """No displacement is known."""
        self.points, self.position, self._private = None, PREVIOUS, False

    def remember(self, displaced: Sequence[ParameterEntry], buffers: Sequence[Tensor], position: float) -> None:
        """The `buffers`, one per parameter of the optimizer, hold (or will, after the step) points at `position`."""
        self.forget()
        if displaced and position:  # at 0 lie the weights themselves, which tell no direction
            self.points, self.position = [None] * len(buffers), position
            for entry in displaced:
                self.points[entry.number] = buffers[entry.number]

    def load(self, points: Buffers | None, position: float) -> None:
        """Take over points that were saved."""
        self.points, self.position, self._private = points, position, points is not None

    def predict_into(self, displaced: Sequence[ParameterEntry], out: Sequence[Tensor], distance: float) -> None:
        """Write ``W_t + distance * d`` of the `displaced` parameters into their buffers among `out`; W_t where d is unknown."""
        weights, buffers = [e.weight for e in displaced], [out[e.number] for e in displaced]
        points = [] if self.points is None else [p for e in displaced if (p := self.points[e.number]) is not None]
        if len(points) < len(displaced):
            copy_weights(weights, buffers)
            return
        # Usual in an engine: its one buffer holds the point and takes the prediction.
        overwritten = _same_buffers(points, buffers)
        if distance == 0:
            if overwritten:  # the direction would be lost; an engine uses W_t itself for s = 0, so this copy is a rare one
                self._replace(displaced, [point.detach().clone() for point in points])
            copy_weights(weights, buffers)
            return
        for weight, point, buffer in zip(weights, points, buffers, strict=True):
            # Element by element, so a point may be overwritten by its own prediction.
            extrapolate(weight, point, self.position, distance, buffer)
        if overwritten or self._private:
            # The old points are gone (or are let go), the predictions are points on the same lines.
            self._replace(displaced, buffers)
            self.position, self._private = distance, False

    def _replace(self, displaced: Sequence[ParameterEntry], points: Sequence[Tensor]) -> None:
        assert self.points is not None
        for entry, point in zip(displaced, points, strict=True):
            self.points[entry.number] = point


def _same_buffers(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists name the same memory."""
    same = [a is b or a.data_ptr() == b.data_ptr() for a, b in zip(first, second, strict=True) if a.numel()]
    if any(same) and not all(same):
        raise ConfigError("some of the buffers hold the previous weights and some do not: pass all of them, or none")
    return all(same)
