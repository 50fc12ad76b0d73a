"""torch's ``DataLoader`` and ``DistributedSampler`` for a loop of one's own, which may begin in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from pipeoptim.errors import ConfigError
from pipeoptim_zoo.data.dataset import check_map_style

__all__ = ["batches_from"]


def batches_from(
    data: Dataset[Any], batch_size: int, start: int = 0, replicas: int = 1, replica: int = 0, seed: int = 0, **options: Any
) -> Iterator[Any]:
    """Mini-batches without end, shuffled in every epoch, from number ``start`` on: those that an undisturbed loop would have drawn.

    The order depends on ``seed`` and the epoch alone, so the number of mini-batches done is all that a checkpoint has to hold, and a
    pipeline has it: ``start=pipe.version(k)`` after ``load_sharded`` or ``Checkpointer.resume``. What lies before it is not loaded. All
    stages of a pipeline draw the same, each of its replicas a part of its own, as ``DistributedSampler`` deals them out.

    Args:
        data: map-style. What it draws at random itself is not part of this: after a resumption it draws other numbers, unless it
            seeds them by the example's number.
        batch_size: examples of one replica; a smaller rest of an epoch is left out.
        start: mini-batches that are done.
        replicas, replica: how many pipelines train together, and which one this is.
        seed: of the order; the same in all processes.
        options: of ``DataLoader``, such as ``num_workers`` and ``collate_fn``.

    Raises:
        ConfigError: ``data`` is not map-style, an epoch is less than a mini-batch, or ``start`` is no number of mini-batches.

    Example:
        >>> import torch
        >>> whole, later = batches_from(torch.arange(10), 4), batches_from(torch.arange(10), 4, start=3)
        >>> [next(whole).tolist() for _ in range(5)][3:] == [next(later).tolist() for _ in range(2)]
        True
    """
    check_map_style("data", data)
    sampler: DistributedSampler[Any] = DistributedSampler(data, replicas, replica, seed=seed, drop_last=True)
    each = len(sampler) // batch_size if batch_size >= 1 else 0
    if each == 0:
        raise ConfigError(
            f"batch_size is {batch_size}, but an epoch has {len(sampler)} examples for each of {replicas} replicas; set it to at least 1 "
            "and at most that"
        )
    if not (isinstance(start, int) and start >= 0):
        raise ConfigError(f"start is {start!r}, must be a number of mini-batches that are done")
    return _epochs(data, sampler, batch_size, *divmod(start, each), options)


def _epochs(
    data: Dataset[Any], sampler: DistributedSampler[Any], batch_size: int, first: int, skipped: int, options: dict[str, Any]
) -> Iterator[Any]:
    for epoch in count(first):
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, batch_size, drop_last=True))
        yield from DataLoader(data, batch_sampler=batches[skipped if epoch == first else 0 :], **options)
