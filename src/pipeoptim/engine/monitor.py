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

COORDINATES = 4096  # per parameter group and stage
TENSORS = 16  # of a group that coordinates are taken from: each one costs a kernel call
RUN = 16  # neighbouring elements of a tensor that are taken together
WINDOW = 20  # measurements that the warning averages over


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
        every: measure the predictions made at every so many versions.
        coordinates, tensors: size of the sample of a group; drawn once, equal in every run.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        k: int,
        every: int = 1,
        coordinates: int = COORDINATES,
        tensors: int = TENSORS,
    ) -> None:
        self.k, self.every = k, every
        generator = torch.Generator().manual_seed(1_000_003 * (k + 1))
        self._samples: list[list[tuple[int, Tensor]]] = []  # of a group: which tensor, which of its elements
        first = 0
        for group in groups:
            chosen = _choose([p.numel() for p in group], coordinates, tensors, generator)
            self._samples.append([(first + n, where.to(group[n].device)) for n, where in chosen])
            first += len(group)
        self._latest: tuple[int, list[Tensor]] | None = None  # version, samples of its weights
        self._pending: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = {}  # (t + s, s) -> W_t, W_hat
        self._found: deque[tuple[int, int, Tensor]] = deque()  # measured, still on the device
        self._figures: dict[int, PredictionError] = {}
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW) for _ in groups]
        self._worse = [False for _ in groups]

    def predicted(self, version: int, steps: int, params: Sequence[Tensor], predicted: Sequence[Tensor]) -> None:
        """At ``version``, ``predicted`` was made for ``steps`` updates later; ``params`` are the latest weights now."""
        if version % self.every == 0 and (version + steps, steps) not in self._pending:
            self._pending[version + steps, steps] = self._at(version, params), self._sample(predicted)

    def updated(self, version: int, params: Sequence[Tensor]) -> None:
        """``params`` have become those of ``version``."""
        for target, steps in [key for key in self._pending if key[0] <= version]:
            before, predicted = self._pending.pop((target, steps))
            if target == version:
                now = self._at(version, params)
                triples = zip(before, predicted, now, strict=True)
                self._found.append((version, steps, torch.stack([_compare(*triple) for triple in triples])))
                if len(self._found) > 1:  # the newest may still be on its way through the device's queue
                    self._read()

    def figures(self) -> list[PredictionError]:
        """The newest measurement of each group that has one."""
        while self._found:
            self._read()
        return [self._figures[n] for n in sorted(self._figures)]

    def forget(self) -> None:
        """The weights were replaced: no prediction that was made holds."""
        self._pending.clear()
        self._latest = None

    def _at(self, version: int, params: Sequence[Tensor]) -> list[Tensor]:
        if self._latest is None or self._latest[0] != version:
            self._latest = version, self._sample(params)
        return self._latest[1]

    @torch.no_grad()
    def _sample(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        empty = torch.empty(0, device=tensors[0].device) if tensors else torch.empty(0)
        taken = [[_wide(tensors[n].take(where)) for n, where in sample] for sample in self._samples]
        return [parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty for parts in taken]

    def _read(self) -> None:
        version, steps, table = self._found.popleft()
        for n, row in enumerate(table.tolist()):
            error, cosine, scale = _figures(row)
            self._judge(n, error, version)
            self._figures[n] = PredictionError(self.k, n, version, steps, error, cosine, scale, self._worse[n])

    def _judge(self, n: int, error: float | None, version: int) -> None:
        """Warn when predictions have become worse than none; again only after they had been better for a while."""
        if error is None:
            return
        window = self._windows[n]
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


def _choose(sizes: Sequence[int], coordinates: int, tensors: int, generator: torch.Generator) -> list[tuple[int, Tensor]]:
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
        chosen.append((n, _draw(sizes[n], count, generator)))
    return chosen


def _draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """About ``count`` of ``size`` elements: all, or runs as long as a cache line, since it is the fetches that cost time."""
    if count >= size:
        return torch.arange(size)
    run = min(RUN, count)
    starts = torch.randint(size // run, (count // run,), generator=generator).sort().values * run
    return (starts.unsqueeze(1) + torch.arange(run)).flatten()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _compare(before: Tensor, predicted: Tensor, now: Tensor) -> Tensor:
    """The products of the predicted and the real displacement with each other: all that the figures need."""
    both = torch.stack([predicted - before, now - before]).double()
    return both @ both.T


def _figures(products: list[list[float]]) -> tuple[float | None, float | None, float | None]:
    """Relative error, cosine and best scale from :func:`_compare`; None where they mean nothing.

    >>> _figures([[1.0, 2.0], [2.0, 4.0]])
    (0.5, 1.0, 2.0)
    """
    (expected, together), (_, real) = products
    if not math.isfinite(expected + real):
        return None, None, None
    error = math.sqrt(max(0.0, expected - 2 * together + real) / real) if real else None
    if not expected:
        return error, None, None
    return error, (together / math.sqrt(expected * real) if real else None), together / expected
