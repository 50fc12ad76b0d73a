"""Cuts a model into contiguous stages that are as even as its blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import Any

from torch import nn

from pipeoptim.errors import ConfigError, counted
from pipeoptim.partitioning.balance import best_cut


def balance(costs: Sequence[int], parts: int) -> list[int]:
    """Lengths of ``parts`` contiguous, non-empty pieces of ``costs`` that minimize the largest sum.

    Ties are broken by the smallest sum of squares. Every piece has a cost above 0 (a stage without
    parameters has nothing to optimize). Exact.

    Raises:
        ConfigError: there is no such cut.

    Example:
        >>> balance([1, 9, 9, 9, 9, 1], 4)
        [2, 1, 1, 2]
    """
    possible = sum(cost > 0 for cost in costs)
    if not possible:
        raise ConfigError(
            f"none of the {len(costs)} blocks of the model has parameters to train; give it some, or unfreeze some"
        )
    if not 1 <= parts <= possible:
        raise ConfigError(
            f"stages is {parts}, but only {possible} of {counted(len(costs), 'block')} have parameters; set stages to 1..{possible}"
        )
    ends = [0, *accumulate(costs)]

    def cost(k: int, start: int, end: int) -> float:  # noqa: ARG001
        return ends[end] - ends[start] or inf

    return best_cut(len(costs), parts, cost)


def cut(model: nn.Module, stages: int, lengths: Sequence[int] = ()) -> list[nn.Module]:
    """``model`` as ``stages`` contiguous pieces, of ``lengths`` blocks or else balanced by their numbers of parameters.

    Args:
        model: an ``nn.Sequential``, or a container with ``len`` and slices that are modules themselves.

    Raises:
        ConfigError: not such a container, too few blocks, or lengths that are not those of the model.

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
            f"stages is {stages}, but the model has only {counted(len(blocks), 'block')}; set stages to at most {len(blocks)}"
        )
    if lengths and (len(lengths) != stages or sum(lengths) != len(blocks)):
        raise ConfigError(
            f"cut is {','.join(map(str, lengths))}, must have a number of blocks for each of {counted(stages, 'stage')}, {len(blocks)} in "
            "all"
        )
    costs = [sum(p.numel() for p in blocks[i].parameters() if p.requires_grad) for i in range(len(blocks))]
    pieces: list[nn.Module] = []
    start = 0
    for length in lengths or balance(costs, stages):
        pieces.append(blocks[start : start + length])
        start += length
    return pieces
