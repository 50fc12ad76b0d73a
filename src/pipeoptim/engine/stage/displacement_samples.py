"""Predictions against the weights that came, at each version that materialises: their displacements on a fixed sample.

Only a fixed random sample of coordinates is looked at, so that this costs next to nothing::

    predicted(t, s)   samples of W_t and W_hat(t+s) ──┐
    updated(t+s)      sample of W_{t+s} ──────────────┴──► products of both displacements, per parameter group
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeoptim.kernels import TensorSampler, available

COORDINATES = 4096  # per parameter group and stage
TENSORS = 16  # of a group that coordinates are taken from: each one costs a kernel call
RUN = 16  # neighbouring elements of a tensor that are taken together

Products = Sequence[Tensor | list[list[float]]]
"""Of each prediction made for a version one table: per group ``[a.a, a.b, b.b]``, a the predicted and b the real displacement."""


@runtime_checkable
class ScaledPredictor(Protocol):
    """A predictor whose predictions have a factor (see :class:`pipeoptim.rules.Predictor`)."""

    scales: tuple[float, ...]


@dataclass
class Pending:
    """Predictions made at one version for another, which has not come yet.

    Attributes:
        before: a sample of the weights that they began with.
        scales: of each group, which they were made with; empty for 1.
        made: by the micro-batches of the mini-batch in progress that they knew, a sample of each.
    """

    before: Tensor
    scales: tuple[float, ...]
    made: dict[int, Tensor] = field(default_factory=dict)


class DisplacementSamples(ABC):
    """Samples the predictions of stage ``k``.

    Args:
        groups: the parameters of each parameter group, as the module holds them.
        k: the stage.
        every: measure the predictions made at every so many versions.
        coordinates, tensors: size of the sample of a group; drawn once, equal in every run.

    Attributes:
        predictor: whose predictions they are, where these have a factor.
    """

    predictor: ScaledPredictor | None = None

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        k: int,
        every: int,
        coordinates: int = COORDINATES,
        tensors: int = TENSORS,
    ) -> None:
        self.k, self.every = k, every
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
        self._pending: dict[tuple[int, int], Pending] = {}  # by (t + s, s)

    def predicted(self, version: int, steps: int, params: Sequence[Tensor], predicted: Sequence[Tensor], seen: int = 0) -> None:
        """At ``version``, ``predicted`` was made for ``steps`` updates later; ``params`` are the latest weights now.

        ``seen``: from how many gradients of the mini-batch in progress. Predictions that differ in nothing else are measured as one: the
        root mean square of their errors.
        """
        if version % self.every:
            return
        if (version + steps, steps) not in self._pending:
            scales = () if self.predictor is None else self.predictor.scales
            self._pending[version + steps, steps] = Pending(self._sample_at(version, params), scales)
        made = self._pending[version + steps, steps].made
        if seen not in made:  # a prediction that several micro-batches share is measured once
            made[seen] = self._sample(predicted)

    def updated(self, version: int, params: Sequence[Tensor]) -> None:
        """``params`` have become those of ``version``."""
        for target, steps in [key for key in self._pending if key[0] <= version]:
            found = self._pending.pop((target, steps))
            if target == version:
                now = self._sample_at(version, params)
                tables = [self._compare_samples(found.before, predicted, now) for predicted in found.made.values()]
                self._take_in(version, steps, found.scales, tables)

    @abstractmethod
    def _take_in(self, version: int, steps: int, scales: tuple[float, ...], tables: Products) -> None:
        """``tables`` of the predictions made with ``scales`` for ``version``, perhaps still on the device."""

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


def summed_tables(tables: Products) -> list[list[float]]:
    """The sum of all predictions of a version, per group; reads them from the device."""
    read = [table.tolist() if isinstance(table, Tensor) else table for table in tables]
    return [[sum(products) for products in zip(*rows, strict=True)] for rows in zip(*read, strict=True)]


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
