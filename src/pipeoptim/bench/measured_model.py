"""A model that is profiled, and what trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

OptimizerOf = Callable[[Any], Optimizer]


@dataclass(frozen=True)
class MeasuredModel:
    """What is profiled.

    Attributes:
        name: for the file.
        model: is copied before it is trained.
        args, kwargs: a mini-batch.
        rows: of it.
        loss_fn, target: as for training; a sum over what the model returns where there is none.
        optimizer: makes one from parameters.
        how, layers: as for :func:`~pipeoptim.partition`.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    rows: int
    optimizer: OptimizerOf
    loss_fn: Callable[..., Any]
    target: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    how: str = "auto"
    layers: Sequence[str] | None = None
