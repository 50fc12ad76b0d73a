"""The best contiguous cut, exactly, by dynamic programming. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipeoptim.errors import ConfigError

StageCost = Callable[[int, int, int], float]
"""``cost(k, start, end)``: of blocks ``start .. end-1`` as stage ``k``; infinite where that cannot be."""


Costs = NDArray[np.float64]
"""Of ranges of blocks, by their start and end."""

ReplicatedCost = Callable[[int, int, int, int], float]
"""``cost(k, start, end, m)``: the same on ``m`` devices."""


def best_cut(blocks: int, parts: int, cost: StageCost) -> list[int]:
    """Lengths of ``parts`` contiguous, non-empty pieces whose largest cost is the least possible.

    Among those cuts, the one with the least sum of squared costs, so that no stage is needlessly slow. Exact:
    ``O(parts * blocks^2)`` calls of ``cost``.

    Args:
        blocks: how many blocks there are.
        parts: how many stages.
        cost: of a stage made of a range of blocks; stages may differ, as devices do.

    Raises:
        ConfigError: no cut has a finite cost.

    Example:
        >>> seconds = [1, 9, 9, 9, 9, 1]
        >>> best_cut(6, 4, lambda k, start, end: sum(seconds[start:end]))
        [2, 1, 1, 2]
    """
    found = np.full((blocks + 1, blocks + 1), inf)

    def of_stage(k: int) -> Costs:
        for start in range(k, blocks - (parts - k) + 1):
            for end in range(start + 1, blocks - (parts - k - 1) + 1):
                found[start, end] = cost(k, start, end)
        return found.copy()

    return best_cut_by_costs(blocks, parts, of_stage)


def best_cut_by_costs(blocks: int, parts: int, of_stage: Callable[[int], Costs]) -> list[int]:
    """As :func:`best_cut`, for ``of_stage(k)[start, end]``, infinite where ``end <= start``: all ranges of a stage at once.

    Example:
        >>> sums = np.array([0.0, 1.0, 10.0, 19.0, 28.0, 37.0, 38.0])
        >>> ranges = np.where(np.arange(7) > np.arange(7)[:, None], sums - sums[:, None], inf)
        >>> best_cut_by_costs(6, 4, lambda k: ranges)
        [2, 1, 1, 2]
    """
    costs = [of_stage(k) for k in range(parts)]
    done = np.where(np.arange(blocks + 1) == blocks, 0.0, inf)  # behind the last stage, by the block where it ended
    rest = done
    for cost in reversed(costs):
        rest = np.maximum(cost, rest).min(axis=1)
    largest = rest[0]
    if largest == inf:
        raise ConfigError(
            f"{blocks} blocks cannot be cut into {parts} stages under these limits; use other pins, more memory or fewer stages"
        )
    rest, ends = done, []
    for cost in reversed(costs):
        # Only cuts that keep the optimum of the first pass.
        squares = np.where(cost <= largest, cost, inf) ** 2 + rest
        ends.append(squares.argmin(axis=1))
        rest = squares.min(axis=1)
    start, lengths = 0, []
    for end in reversed(ends):
        lengths.append(int(end[start]) - start)
        start = int(end[start])
    return lengths


def best_replicas(
    seconds: Sequence[float], weight_bytes: Sequence[float], devices: int, bandwidth: float
) -> tuple[list[int], list[int]]:
    """The best cut of a model over ``devices`` equal devices when a stage may be replicated.

    A stage of blocks with time T and weights of w bytes on m devices takes ``max(T, 2 (m-1)/m * w / bandwidth) / m`` per
    mini-batch: its replicas share the mini-batches, and the reduction of their gradients overlaps with computing.

    Args:
        seconds: forward and backward of each block.
        weight_bytes: of each block.
        devices: how many there are; all are used.
        bandwidth: bytes per second between replicas.

    Returns:
        Lengths of the stages, and replicas of each.

    Example:
        >>> best_replicas([1, 1, 1, 1], [0, 0, 0, 0], devices=4, bandwidth=1.0)
        ([4], [4])
        >>> best_replicas([3, 1], [0, 100], devices=4, bandwidth=1.0)
        ([1, 1], [3, 1])

    Source: the partitioner of PipeDream (SOSP 2019, section 3.1), for one level of the network. Among equally fast plans the
    one with the fewest stages is taken, which needs the least memory for activations and has the smallest gap.
    """
    time, size = _prefix(seconds), _prefix(weight_bytes)

    def stage(_: int, start: int, end: int, m: int) -> float:
        return shared(time[end] - time[start], size[end] - size[start], m, bandwidth)

    plans = [best_replicated_cut(len(seconds), parts, devices, stage) for parts in range(1, min(len(seconds), devices) + 1)]
    _, lengths, replicas = min(plans, key=lambda plan: plan[0])
    return lengths, replicas


def shared(seconds: float, weight_bytes: float, m: int, bandwidth: float) -> float:
    """Seconds per mini-batch of a stage on ``m`` devices, as in :func:`best_replicas`."""
    return max(seconds, 2 * (m - 1) / m * weight_bytes / bandwidth) / m


def best_replicated_cut(blocks: int, parts: int, devices: int, cost: ReplicatedCost) -> tuple[float, list[int], list[int]]:
    """The largest cost, the lengths and the replicas of the best ``parts`` contiguous pieces on ``devices`` devices in all.

    Exact, by dynamic programming: ``O(parts * blocks^2 * devices^2)`` calls of ``cost``.

    Args:
        blocks, parts: as for :func:`best_cut`.
        devices: all are used.
        cost: of a stage made of a range of blocks on m devices.

    Example:
        >>> best_replicated_cut(2, 2, 4, lambda k, start, end, m: [3, 1][start] / m)
        (1.0, [1, 1], [3, 1])
    """

    @cache
    def best(k: int, start: int, left: int) -> tuple[float, tuple[tuple[int, int], ...]]:
        if k == parts:
            return (0.0, ()) if start == blocks and left == 0 else (inf, ())
        found: tuple[float, tuple[tuple[int, int], ...]] = (inf, ())
        for end in range(start + 1, blocks - (parts - k - 1) + 1):
            for m in range(1, left - (parts - k - 1) + 1):
                own = cost(k, start, end, m)
                # A stage slower than the best plan so far cannot be part of a better one.
                if own < found[0]:
                    slowest, plan = best(k + 1, end, left - m)
                    found = min(found, (max(own, slowest), ((end - start, m), *plan)), key=lambda option: option[0])
        return found

    largest, plan = best(0, 0, devices)
    return largest, [length for length, _ in plan], [m for _, m in plan]


def _prefix(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
