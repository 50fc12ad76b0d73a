"""What a data set is to a pipeline: batches that every process can compute for itself.

A batch depends on ``(seed, step)`` and on nothing else: not on the global random state, not on earlier calls.
So the first stage (inputs) and the last stage (targets) agree without talking, and a run resumed at step n
continues as the uninterrupted run would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError

__all__ = ["IndexedTask", "ExampleSource", "Task", "TensorSource", "generator", "shuffled"]

_MASK = (1 << 64) - 1
_VALIDATION_SEED = 1  # not the run's seed: runs with different seeds are validated on the same batches


@runtime_checkable
class Task(Protocol):
    """A data set with its loss. Inputs ``x`` go to the first stage, targets ``y`` to the last one."""

    @property
    def name(self) -> str: ...

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Mini-batch number ``step`` (0, 1, ...): a function of (seed, step, batch_size) alone."""
        ...

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All validation examples once, in a fixed order; the last batch may be smaller."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Mini-batches in one pass over the training examples."""
        ...

    def loss(self, output: Tensor, target: Tensor, /) -> Tensor:
        """Mean loss of a batch; ``task.loss`` is a plain module-level function, so it can be pickled."""
        ...

    def metrics(self, output: Tensor, target: Tensor, /) -> dict[str, float]:
        """Further figures of a batch, each a mean over its examples (or tokens)."""
        ...

    def describe(self) -> str:
        """One line that says what the data is, how much of it there is, and where it came from."""
        ...


class ExampleSource(Protocol):
    """Examples by number. ``generator`` is None where augmentation would be wrong (validation)."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]: ...


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator that is a function of all ``seeds``, whatever their sizes.

    The seeds are mixed with splitmix64, since torch's Mersenne twister is seeded with the low 32 bits only:
    neighbouring (seed, step) pairs must not collide or correlate. Raises ConfigError for a seed that is no integer.
    """
    state = 0
    for seed in seeds:
        if not isinstance(seed, int):
            raise ConfigError(f"seed is {seed!r}, must be an integer")
        state = (state ^ (seed & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0xFFFFFFFF)


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """The order of ``size`` examples in one epoch: a permutation, ``[size]`` int64."""
    return torch.randperm(size, generator=generator(seed, epoch))


@dataclass(frozen=True)
class TensorSource:
    """Examples that lie in memory: ``x[i], y[i]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.y[indices]


@dataclass(eq=False)
class IndexedTask:
    """A :class:`Task` over two :class:`ExampleSource` s: shuffled every epoch, without replacement.

    Epoch e visits the training examples in the order ``shuffled(n, seed, e)``; the ``n mod batch_size``
    examples left over at its end are dropped, others in every epoch. ``vocab_size`` (ids of the input) and
    ``classes`` and ``context`` (tokens) say which size of model fits; 0 where they do not apply. ``also_save``: what an export of the model
    is to have beside its weights, such as its tokenizer.
    """

    name: str
    train: ExampleSource
    validation: ExampleSource
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, float]]
    origin: str
    seed: int = 0
    vocab_size: int = 0
    classes: int = 0
    context: int = 0
    also_save: Sequence[Any] = ()
    _order: tuple[int, Tensor] = field(default=(-1, torch.empty(0)), init=False, repr=False, compare=False)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole mini-batches in one epoch. Raises ConfigError if there is none."""
        if not 1 <= batch_size <= len(self.train):
            raise ConfigError(
                f"batch_size={batch_size} does not fit the {len(self.train)} training examples of "
                f"{self.name}; choose 1..{len(self.train)}"
            )
        return len(self.train) // batch_size

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Mini-batch ``step`` of the endless training stream. Raises ConfigError if step < 0."""
        if step < 0:
            raise ConfigError(f"step={step} is negative; steps are counted from 0")
        epoch, place = divmod(step, self.steps_per_epoch(batch_size))
        if self._order[0] != epoch:  # a cache: the order is a function of (seed, epoch)
            self._order = (epoch, shuffled(len(self.train), self.seed, epoch))
        indices = self._order[1][place * batch_size : (place + 1) * batch_size]
        return self.train.batch(indices, generator(self.seed, 1, step))

    def validation_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every validation example once, without augmentation, in one fixed random order.

        Random, so that the first batches alone are a fair sample of a data set that is sorted by class.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is not positive; choose at least 1")
        order = shuffled(len(self.validation), _VALIDATION_SEED, 0)
        for start in range(0, len(order), batch_size):
            yield self.validation.batch(order[start : start + batch_size], None)

    def describe(self) -> str:
        """Name, sizes and origin in one line."""
        sizes = f"{len(self.train)} training, {len(self.validation)} validation examples"
        return f"{self.name}: {sizes}; {self.origin}"
