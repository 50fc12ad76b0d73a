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

import torch
from torch import Tensor

from pipeoptim.kernels import TensorSampler, available

COORDINATES = 4096  # per parameter group and stage
TENSORS = 16  # of a group that coordinates are taken from: each one costs a kernel call
RUN = 16  # neighbouring elements of a tensor that are taken together
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
        worse: whether the mean relative error of the last 20 measurements is above 1: worse than no prediction.
    """

    stage: int
    group: int
    version: int
    steps: int
    relative_error: float | None
    cosine: float | None
    best_scale: float | None
    worse: bool = False


class PredictionMonitor:
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
        self.k, self.every = k, every or min(SELDOM, math.ceil(LARGE / max(1, weights)))
        # Of its own: drawing the sample must not move the user's random numbers, nor differ from run to run.
        generator = torch.Generator().manual_seed(1_000_003 * (k + 1))
        self._samples: list[list[tuple[int, Tensor]]] = []  # of a group: which tensor, which of its elements
        self._group_slices: list[slice] = []  # of a group: its part of a sample
        first = taken = 0
        for group in groups:
            chosen = _choose_sample([p.numel() for p in group], coordinates, tensors, generator)
            self._samples.append([(first + n, where.to(group[n].device)) for n, where in chosen])
            first += len(group)
            size = sum(where.numel() for _, where in chosen)
            self._group_slices.append(slice(taken, taken + size))
            taken += size
        self._places = [place for sample in self._samples for place in sample]
        self._sampler = TensorSampler(self._samples) if all(where.is_cpu for _, where in self._places) else None
        self._latest: tuple[int, Tensor] | None = None  # version, a sample of its weights
        self._pending: dict[tuple[int, int], tuple[Tensor, dict[int, Tensor]]] = {}  # (t + s, s) -> W_t, and every W_hat
        self._unread: deque[tuple[int, int, list[Tensor | list[list[float]]]]] = (
            deque()
        )  # measured, perhaps still on the device
        self._figures: dict[int, PredictionError] = {}
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW) for _ in groups]
        self._worse = [False for _ in groups]

    def predicted(self, version: int, steps: int, params: Sequence[Tensor], predicted: Sequence[Tensor], seen: int = 0) -> None:
        """At ``version``, ``predicted`` was made for ``steps`` updates later; ``params`` are the latest weights now.

        ``seen``: from how many gradients of the mini-batch in progress. Predictions that differ in nothing else are measured as one: the
        root mean square of their errors.
        """
        if version % self.every:
            return
        if (version + steps, steps) not in self._pending:
            self._pending[version + steps, steps] = self._sample_at(version, params), {}
        _, made = self._pending[version + steps, steps]
        if seen not in made:  # a prediction that several micro-batches share is measured once
            made[seen] = self._sample(predicted)

    def updated(self, version: int, params: Sequence[Tensor]) -> None:
        """``params`` have become those of ``version``."""
        for target, steps in [key for key in self._pending if key[0] <= version]:
            before, made = self._pending.pop((target, steps))
            if target == version:
                now = self._sample_at(version, params)
                tables = [self._compare_samples(before, predicted, now) for predicted in made.values()]
                self._unread.append((version, steps, tables))
                if len(self._unread) > 1:  # the newest may still be on its way through the device's queue
                    self._read_oldest()

    def figures(self) -> list[PredictionError]:
        """The newest measurement of each group that has one."""
        while self._unread:
            self._read_oldest()
        return [self._figures[n] for n in sorted(self._figures)]

    def forget(self) -> None:
        """The weights were replaced: no prediction that was made holds."""
        self._pending.clear()
        self._latest = None

    def _sample_at(self, version: int, params: Sequence[Tensor]) -> Tensor:
        if self._latest is None or self._latest[0] != version:
            self._latest = version, self._sample(params)
        return self._latest[1]

    def _sample(self, tensors: Sequence[Tensor]) -> Tensor:
        taken = self._sampler(tensors) if self._sampler is not None else None
        if taken is not None or not self._places:
            return torch.empty(0) if taken is None else taken
        with torch.no_grad():
            return torch.cat([_widened(tensors[n].take(where)) for n, where in self._places])

    def _compare_samples(self, before: Tensor, predicted: Tensor, now: Tensor) -> Tensor | list[list[float]]:
        by_kernel = self._sampler is not None and all(s.is_cpu and s.dtype is torch.float32 for s in (before, predicted, now))
        if self._sampler is not None and by_kernel and available():
            return self._sampler.products(before, predicted, now)
        return _displacement_products(before, predicted, now, self._group_slices)

    def _read_oldest(self) -> None:
        version, steps, tables = self._unread.popleft()
        read = [table.tolist() if isinstance(table, Tensor) else table for table in tables]
        for n, rows in enumerate(zip(*read, strict=True)):
            row = [sum(products) for products in zip(*rows, strict=True)]
            error, cosine, scale = _figures(row)
            self._judge_error(n, error, version)
            self._figures[n] = PredictionError(self.k, n, version, steps, error, cosine, scale, self._worse[n])

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


def _choose_sample(
    sizes: Sequence[int], coordinates: int, tensors: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Tensors drawn with a chance that grows with their size, and elements of each in proportion to its size."""
    possible = [n for n, size in enumerate(sizes) if size]
    if len(possible) > tensors:
        weights = torch.tensor([float(sizes[n]) for n in possible], dtype=torch.float64)
        picked = torch.multinomial(weights, tensors, generator=generator).tolist()
        possible = sorted(possible[i] for i in picked)
    everything = sum(sizes[n] for n in possible)
    chosen = []
    for n in possible:
        count = sizes[n] if everything <= coordinates else max(1, sizes[n] * coordinates // everything)
        chosen.append((n, _draw_elements(sizes[n], count, generator)))
    return chosen


def _draw_elements(size: int, count: int, generator: torch.Generator) -> Tensor:
    """About ``count`` of ``size`` elements: all, or runs as long as a cache line, since it is the fetches that cost time."""
    if count >= size:
        return torch.arange(size)
    run = min(RUN, count)
    starts = torch.randint(size // run, (count // run,), generator=generator).sort().values * run
    return (starts.unsqueeze(1) + torch.arange(run)).flatten()


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _displacement_products(before: Tensor, predicted: Tensor, now: Tensor, parts: Sequence[slice]) -> Tensor:
    """For each part the products of the predicted and the real displacement with each other: all that the figures need."""
    # Differences in the sample's type, products in float64: sums of thousands of squares of tiny numbers.
    expected, real = torch.stack([predicted, now]).sub_(before).double()
    return torch.stack(
        [x[part] @ y[part] for part in parts for x, y in ((expected, expected), (expected, real), (real, real))]
    ).view(-1, 3)


def _figures(products: list[float]) -> tuple[float | None, float | None, float | None]:
    """Relative error, cosine and best scale from :func:`_displacement_products`; None where they mean nothing.

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
