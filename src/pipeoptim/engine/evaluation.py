"""A whole evaluation: the mean of loss and parts over many batches, each counted by its rows, known to every process in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeoptim.errors import ConfigError


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
