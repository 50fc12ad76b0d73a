"""A whole evaluation: the mean of loss and parts over many batches, each counted by its rows, known to every process in the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeoptim.engine.microbatches import weight_of
from pipeoptim.engine.splitting import count_rows
from pipeoptim.errors import ConfigError
from pipeoptim.options import LossWeight


@dataclass(frozen=True)
class Evaluation:
    """What :meth:`Pipeline.evaluate <pipeoptim.engine.pipeline.Pipeline.evaluate>` found, the same on every process.

    Attributes:
        loss: mean over all rows, or as ``loss_weight`` weighs.
        parts: means of the other entries that ``loss_fn`` returned, by name.
        weight: what the means are divided by: the rows, or the sum of ``loss_weight``.
        batches: how many there were.
    """

    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    weight: float = 0.0
    batches: int = 0


class Batch(NamedTuple):
    """The arguments of a call of ``eval_step``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    stage_kwargs: Any


def read_batch(batch: Any) -> Batch:
    """``(inputs, target)`` or ``(inputs, target, stage_kwargs)`` as arguments.

    Inputs are a tuple of positional arguments, a dict of keyword arguments, or else one argument.

    Raises:
        ConfigError: it is something else.

    Example:
        >>> read_batch(((1, 2), 3)).args, read_batch([1, 3]).args, read_batch(({"x": 1}, None)).kwargs
        ((1, 2), (1,), {'x': 1})
    """
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        given = f"a {type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise ConfigError(
            f"evaluate was given {given} as a batch, must be (inputs, target) or (inputs, target, stage_kwargs); inputs may be a tuple of "
            "positional arguments or a dict of keyword arguments, target None"
        )
    inputs, target, *rest = batch
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), target, *rest or [None])
    return Batch(inputs if isinstance(inputs, tuple) else (inputs,), {}, target, *rest or [None])


def each_batch(batches: Any) -> Iterator[Any]:
    """An iterator over what ``evaluate`` was given.

    Raises:
        ConfigError: nothing can be iterated over.
    """
    try:
        return iter(batches)
    except TypeError:
        raise ConfigError(
            f"evaluate was given a {type(batches).__name__}, must be an iterable of batches, such as a DataLoader"
        ) from None


def check_countable(number: int, inputs: Sequence[Any], target: Any) -> None:
    """For ``inputs`` that do not agree on their rows, which the last stage cannot see.

    Raises:
        ConfigError: they have different ones, and the target has none either.
    """
    found = {rows for rows in map(count_rows, inputs) if rows is not None}
    if len(found) > 1 and count_rows(target) is None:
        raise ConfigError(
            f"inputs of batch {number} of the evaluation have {' and '.join(map(str, sorted(found)))} rows, so it is not clear how many it "
            "counts; wrap what has other rows in pipeoptim.Whole or pipeoptim.Along, or count by loss_weight="
        )


class BatchWeights:
    """What each batch of an evaluation counts: its rows, or what ``loss_weight`` says of its target."""

    def __init__(self, loss_weight: LossWeight | None) -> None:
        self._loss_weight = loss_weight
        self._first: tuple[int, int] | None = None  # rows of input and target of the first batch that has both
        self._countable: bool | None = None

    def weight(self, number: int, rows: int, target: Any) -> float:
        """Of batch ``number``, whose inputs have ``rows``; 0 where they have none or nobody knows.

        Raises:
            ConfigError: ``loss_weight`` returns no weight, or it is unclear what the rows are.
        """
        if self._loss_weight is not None:
            return weight_of(self._loss_weight, target)
        theirs = count_rows(target) or 0
        if rows and theirs:
            # Targets may be flattened. As long as they have always as many entries for a row, both counts give the same mean.
            first = self._first = self._first or (rows, theirs)
            if rows * first[1] != theirs * first[0]:
                raise ConfigError(
                    f"batch {number} of the evaluation has {rows} rows of inputs and {theirs} of the target, but one before it had "
                    f"{first[0]} and {first[1]}, so it is not clear how many it counts; give both one row for each sample, "
                    "wrap what has another batch dimension in pipeoptim.Along, or count by loss_weight="
                )
        countable = bool(rows or theirs)
        if self._countable not in (None, countable):
            raise ConfigError(
                f"batch {number} of the evaluation has {'rows' if countable else 'none'} that can be counted, but those before it had "
                f"{'none' if countable else 'some'}; wrap what has other rows than the inputs in pipeoptim.Whole, or count by loss_weight="
            )
        self._countable = countable
        return float(rows or theirs or 1)  # without rows anywhere, all batches count alike


class WeightedMeans:
    """Sums of losses and parts, on the device of the last stage: what they were is not waited for in between."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._loss: Tensor | None = None
        self._weight = 0.0
        self._batches = 0

    def add(self, loss: Tensor, parts: Mapping[str, Tensor], weight: float) -> None:
        """One batch, which counts ``weight``; one that counts 0 is not in the means, for the mean of nothing is NaN."""
        self._batches += 1
        if not weight:
            return
        self._weight += weight
        self._loss = _add_weighted(self._loss, loss, weight)
        for name, value in parts.items():
            self._sums[name] = _add_weighted(self._sums.get(name), value, weight)
            # By part, since a loss_fn need not return every part for every batch.
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def result(self) -> dict[str, Any]:
        """As plain data, for :func:`evaluation_of`."""
        return {
            # The first wait for the device, after the last batch.
            "loss": None if self._loss is None else self._loss.item() / self._weight,
            "parts": {name: value.item() / self._weights[name] for name, value in self._sums.items()},
            "weight": self._weight,
            "batches": self._batches,
        }


def evaluation_of(result: Mapping[str, Any]) -> Evaluation:
    """From what :class:`WeightedMeans` found.

    Raises:
        ConfigError: there was no batch, or none that counts.
    """
    if result["loss"] is None:
        raise ConfigError(
            f"evaluate was given {result['batches']} batches that count for anything; give at least one, on all processes alike"
        )
    return Evaluation(**result)


def _add_weighted(before: Tensor | None, value: Tensor, weight: float) -> Tensor:
    # float64, since thousands of batches are summed, and rows of different sizes weigh differently.
    product = value.detach().to(torch.float64) * weight
    return product if before is None else before + product
