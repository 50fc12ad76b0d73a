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
        positions: where on their lines the points lie; param groups may be scaled differently.
    """

    def __init__(self) -> None:
        self.points: Buffers | None = None
        self.positions: list[float] = []
        self._private = False  # points of our own, from a resume: dropped once the engine's buffers hold points as well

    def forget(self) -> None:
        """No displacement is known."""
        self.points, self.positions, self._private = None, [], False

    def remember(self, displaced: Sequence[ParameterEntry], buffers: Sequence[Tensor], positions: Sequence[float]) -> None:
        """The `buffers`, one per parameter of the optimizer, hold (or will, after the step) points at `positions` of the `displaced`."""
        self.forget()
        if displaced and all(positions):  # at 0 lie the weights themselves, which tell no direction
            self.points, self.positions = [None] * len(buffers), [PREVIOUS] * len(buffers)
            for entry, position in zip(displaced, positions, strict=True):
                self.points[entry.number], self.positions[entry.number] = buffers[entry.number], position

    def saved_positions(self) -> float | list[float]:
        """What :meth:`load` takes: one number where they are all the same."""
        different = set(self.positions) or {PREVIOUS}
        return different.pop() if len(different) == 1 else list(self.positions)

    def load(self, points: Buffers | None, positions: float | Sequence[float]) -> None:
        """Take over points that were saved."""
        self.points, self._private = points, points is not None
        count = 0 if points is None else len(points)
        self.positions = [float(positions)] * count if isinstance(positions, int | float) else [float(p) for p in positions]

    def predict_into(self, displaced: Sequence[ParameterEntry], out: Sequence[Tensor], distances: Sequence[float]) -> None:
        """Write ``W_t + distance * d`` of the `displaced` parameters into their buffers among `out`; W_t where d is unknown.

        `distances`: one for each of them; all are 0, or none is.
        """
        weights, buffers = [e.weight for e in displaced], [out[e.number] for e in displaced]
        points = [] if self.points is None else [p for e in displaced if (p := self.points[e.number]) is not None]
        if len(points) < len(displaced):
            copy_weights(weights, buffers)
            return
        # Usual in an engine: its one buffer holds the point and takes the prediction.
        overwritten = _same_buffers(points, buffers)
        if not all(distances):
            if overwritten:  # the direction would be lost; an engine uses W_t itself for s = 0, so this copy is a rare one
                self._replace(displaced, [point.detach().clone() for point in points])
            copy_weights(weights, buffers)
            return
        for entry, weight, point, buffer, distance in zip(displaced, weights, points, buffers, distances, strict=True):
            # Element by element, so a point may be overwritten by its own prediction.
            extrapolate(weight, point, self.positions[entry.number], distance, buffer)
        if overwritten or self._private:
            # The old points are gone (or are let go), the predictions are points on the same lines.
            self._replace(displaced, buffers)
            for entry, distance in zip(displaced, distances, strict=True):
                self.positions[entry.number] = distance
            self._private = False

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
