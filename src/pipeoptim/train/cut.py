"""Cutting a model into contiguous stages, as even as its blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from pipeoptim.errors import ConfigError


def balance(costs: Sequence[int], parts: int) -> list[int]:
    """Lengths of ``parts`` contiguous, non-empty pieces of ``costs`` with the least largest sum.

    Among those cuts, the one with the least sum of squares. Every piece has a cost above 0 (a stage without
    parameters has nothing to optimize). Exact, by dynamic programming: O(parts * len(costs)^2).

    Raises:
        ConfigError: there is no such cut.

    Example:
        >>> balance([1, 9, 9, 9, 9, 1], 4)
        [2, 1, 1, 2]
    """
    possible = sum(cost > 0 for cost in costs)
    if not 1 <= parts <= possible:
        raise ConfigError(
            f"stages is {parts}, but only {possible} of {len(costs)} blocks have parameters; set stages to 1..{possible}"
        )
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)
    largest = _least_largest(ends, parts)
    return _least_squares(ends, parts, largest)


def _least_largest(ends: list[int], parts: int) -> int:
    count = len(ends) - 1

    @cache
    def best(start: int, left: int) -> float:
        if left == 1:
            cost = ends[count] - ends[start]
            return cost if cost > 0 else float("inf")
        return min(
            (
                max(ends[e] - ends[start], best(e, left - 1))
                for e in range(start + 1, count - left + 2)
                if ends[e] > ends[start]
            ),
            default=float("inf"),
        )

    return int(best(0, parts))


def _least_squares(ends: list[int], parts: int, largest: int) -> list[int]:
    count = len(ends) - 1
    nothing: tuple[float, tuple[int, ...]] = (float("inf"), ())

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if left == 0:
            return (0.0, ()) if start == count else nothing
        options = [nothing]
        for end in range(start + 1, count - left + 2):
            cost = ends[end] - ends[start]
            if 0 < cost <= largest:
                rest, lengths = best(end, left - 1)
                options.append((cost * cost + rest, (end - start, *lengths)))
        return min(options, key=lambda option: option[0])

    return list(best(0, parts)[1])


def cut(model: nn.Module, stages: int) -> list[nn.Module]:
    """``model`` as ``stages`` contiguous pieces, balanced by their numbers of parameters.

    Args:
        model: an ``nn.Sequential``, or a container with ``len`` and slices that are modules themselves.

    Raises:
        ConfigError: not such a container, too few blocks, or a parameter that two stages would share.

    Example:
        >>> [len(stage) for stage in cut(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 2)]
        [1, 2]
    """
    blocks: Any = model
    if not (hasattr(model, "__len__") and hasattr(model, "__getitem__")):
        raise ConfigError(
            f"the model is a {type(model).__name__}, which cannot be sliced into stages; make it an nn.Sequential of blocks"
        )
    if stages > len(blocks):
        raise ConfigError(
            f"stages is {stages}, but the model has only {len(blocks)} blocks; set stages to at most {len(blocks)}"
        )
    costs = [sum(p.numel() for p in blocks[i].parameters() if p.requires_grad) for i in range(len(blocks))]
    pieces: list[nn.Module] = []
    start = 0
    for length in balance(costs, stages):
        pieces.append(blocks[start : start + length])
        start += length
    _check_not_shared(pieces)
    return pieces


def _check_not_shared(pieces: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for k, piece in enumerate(pieces):
        for name, parameter in piece.named_parameters():
            first = owner.setdefault(id(parameter), k)
            if first != k:
                raise ConfigError(
                    f"parameter {name!r} of stage {k} is also on stage {first}; "
                    "weights tied across stages cannot be trained: untie them, or use fewer stages"
                )
