"""Any map-style dataset of torch as a task: ``pipeoptim train --data mine:task`` in three lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.losses import accuracy, cross_entropy
from pipeoptim_zoo.data.task import IndexedTask

__all__ = ["check_map_style", "dataset_task"]


def dataset_task(
    train: Dataset[Any],
    validation: Dataset[Any],
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    metrics: Callable[[Any, Any], dict[str, float]] = accuracy,
    collate: Callable[[list[Any]], tuple[Tensor, Tensor]] = default_collate,
    seed: int = 0,
    name: str = "dataset",
) -> IndexedTask:
    """What a shuffling ``DataLoader`` and its sampler do, as a function of (seed, step): every process computes the same batch, and a run
    that is resumed in the middle of an epoch goes on with the next one.

    Args:
        train, validation: examples by number, each a pair of input and target; random augmentation draws torch's random numbers, which
            are seeded for each mini-batch.
        loss, metrics: of the model's output and the targets.
        collate: a list of examples to inputs and targets, as ``DataLoader`` has it.
        seed: of the order.

    Raises:
        ConfigError: a dataset has no length, or no examples.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(6.0).view(6, 1), torch.arange(6))
        >>> task = dataset_task(data, data)
        >>> sorted(int(y) for step in range(3) for y in task.train_batch(step, 2)[1])
        [0, 1, 2, 3, 4, 5]
    """
    check_map_style("train", train)
    check_map_style("validation", validation)
    examples, held_out = (_Examples(data, collate) for data in (train, validation))
    return IndexedTask(name, examples, held_out, loss, metrics, origin=type(train).__name__, seed=seed)


def check_map_style(what: str, data: Any) -> None:
    """Raises a ConfigError unless ``data`` has examples, and says how many."""
    if not hasattr(data, "__len__") or not len(data):
        raise ConfigError(f"{what} is a {type(data).__name__} without examples that are counted, must be a map-style dataset")


@dataclass(frozen=True)
class _Examples:
    data: Any
    collate: Callable[[list[Any]], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if generator is None else generator.initial_seed())
            x, y = self.collate([self.data[i] for i in indices.tolist()])
        return x, y
