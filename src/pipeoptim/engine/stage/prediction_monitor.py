"""How good was the prediction? At each version that materialises, hold it against what had been predicted for it.

Only a fixed random sample of coordinates is looked at, so that this costs next to nothing. It is the sensor for
:mod:`pipeoptim.telemetry.prediction` and for whoever tunes predictions while training.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeoptim.engine.stage.displacement_samples import (
    COORDINATES,
    TENSORS,
    DisplacementSamples,
    Products,
    summed_tables,
)

WINDOW = 20  # measurements that the warning averages over
LARGE = 60_000_000  # weights of a stage whose update takes 100 times as long as a measurement, and more
SELDOM = 10  # versions between measurements of small stages, whose forwards and backwards take longer than their update


class PredictionWarning(UserWarning):
    """A stage's weight prediction is worse than none."""


@dataclass(frozen=True)
class PredictionError:
    """The prediction made at version t for version t + s, against the weights W that came.

    Attributes:
        stage, group: whose weights: stage k, parameter group of its optimizer.
        version: t + s.
        steps: s.
        relative_error: ``|W_hat - W| / |W - W_t|``; 0 is perfect, 1 as good as no prediction. None where nothing moved.
        cosine: between ``W_hat - W_t`` and ``W - W_t``. None where either is 0.
        best_scale: the factor on ``W_hat - W_t`` that would have fitted best, by least squares. None as cosine.
        scale: the factor that the prediction was made with.
        worse: whether the mean relative error of the last 20 measurements is above 1: worse than no prediction.
    """

    stage: int
    group: int
    version: int
    steps: int
    relative_error: float | None
    cosine: float | None
    best_scale: float | None
    scale: float = 1.0
    worse: bool = False


class PredictionMonitor(DisplacementSamples):
    """Measures the predictions of stage ``k``.

    Args:
        groups: the parameters of each parameter group, as the module holds them.
        k: the stage.
        every: measure the predictions made at every so many versions; by default at every one of stages with 60 million weights,
            half as often with half as many, and so on, but at every 10th in any case.
        coordinates, tensors: size of the sample of a group; drawn once, equal in every run.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        k: int,
        every: int | None = None,
        coordinates: int = COORDINATES,
        tensors: int = TENSORS,
    ) -> None:
        weights = sum(p.numel() for group in groups for p in group)
        super().__init__(groups, k, every or min(SELDOM, math.ceil(LARGE / max(1, weights))), coordinates, tensors)
        self._unread: deque[tuple[int, int, tuple[float, ...], Products]] = deque()  # measured, perhaps still on the device
        self._figures: dict[int, PredictionError] = {}
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW) for _ in groups]
        self._worse = [False for _ in groups]

    def _take_in(self, version: int, steps: int, scales: tuple[float, ...], tables: Products) -> None:
        self._unread.append((version, steps, scales, tables))
        if len(self._unread) > 1:  # the newest may still be on its way through the device's queue
            self._read_oldest()

    def figures(self) -> list[PredictionError]:
        """The newest measurement of each group that has one."""
        while self._unread:
            self._read_oldest()
        return [self._figures[n] for n in sorted(self._figures)]

    def _read_oldest(self) -> None:
        version, steps, scales, tables = self._unread.popleft()
        for n, row in enumerate(summed_tables(tables)):
            error, cosine, best = _figures(row)
            self._judge_error(n, error, version)
            scale = scales[n] if scales else 1.0
            self._figures[n] = PredictionError(self.k, n, version, steps, error, cosine, best, scale, self._worse[n])

    def _judge_error(self, n: int, error: float | None, version: int) -> None:
        """Warn when predictions have become worse than none; again only after they had been better for a while."""
        if error is None:
            return
        window = self._windows[n]
        # The mean of many: a single prediction may well be worse than none where the weights hardly move.
        window.append(error)
        if len(window) < WINDOW:
            return
        mean = sum(window) / len(window)
        if mean > 1 and not self._worse[n]:
            self._worse[n] = True
            warnings.warn(
                f"the weight prediction of stage {self.k}, parameter group {n}, is worse than none: relative error {mean:.2f} "
                f"over the {WINDOW} measurements up to version {version}; lower the learning rate, use more micro-batches, or "
                "another prediction",
                PredictionWarning,
                stacklevel=2,
            )
        elif mean < 1:
            self._worse[n] = False


def _figures(products: list[float]) -> tuple[float | None, float | None, float | None]:
    """Relative error, cosine and best scale from the three products of displacements; None where they mean nothing.

    >>> _figures([1.0, 2.0, 4.0])
    (0.5, 1.0, 2.0)
    """
    expected, together, real = products
    if not math.isfinite(expected + real):
        return None, None, None
    # |e - r|^2 from the three products; max(), since rounding may leave a tiny negative number.
    error = math.sqrt(max(0.0, expected - 2 * together + real) / real) if real else None
    if not expected:
        return error, None, None
    return error, (together / math.sqrt(expected * real) if real else None), together / expected
