"""The best contiguous cut, exactly, by dynamic programming. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import inf

from pipeoptim.errors import ConfigError

StageCost = Callable[[int, int, int], float]
"""``cost(k, start, end)``: of blocks ``start .. end-1`` as stage ``k``; infinite where that cannot be."""


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
    # Both passes ask for the same ranges.
    cost = cache(cost)

    @cache
    def least_largest(k: int, start: int) -> float:
        if k == parts:
            return 0.0 if start == blocks else inf
        ends = range(start + 1, blocks - (parts - k - 1) + 1)
        return min((max(cost(k, start, end), least_largest(k + 1, end)) for end in ends), default=inf)

    largest = least_largest(0, 0)
    if largest == inf:
        raise ConfigError(
            f"{blocks} blocks cannot be cut into {parts} stages under these limits; use other pins, more memory or fewer stages"
        )

    @cache
    def least_squares(k: int, start: int) -> tuple[float, tuple[int, ...]]:
        if k == parts:
            return (0.0, ()) if start == blocks else (inf, ())
        best: tuple[float, tuple[int, ...]] = (inf, ())
        for end in range(start + 1, blocks - (parts - k - 1) + 1):
            own = cost(k, start, end)
            # Only cuts that keep the optimum of the first pass.
            if own <= largest:
                rest, lengths = least_squares(k + 1, end)
                best = min(best, (own * own + rest, (end - start, *lengths)), key=lambda option: option[0])
        return best

    return list(least_squares(0, 0)[1])


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
