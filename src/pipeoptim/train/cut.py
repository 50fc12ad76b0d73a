"""Cuts a model into contiguous stages that are as even as its blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf
from typing import Any

from torch import Tensor, nn

from pipeoptim.errors import ConfigError, counted
from pipeoptim.partitioning.api import partition
from pipeoptim.partitioning.balance import best_cut
from pipeoptim.partitioning.block_costs import BlockCost
from pipeoptim.partitioning.layer_splitter import LayerSplitter
from pipeoptim.partitioning.result import Partition


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


def cut_between_layers(model: nn.Module, stages: int, sample: Tensor, lengths: Sequence[int] = ()) -> Partition:
    """An ordinary ``model`` as ``stages`` stages, of ``lengths`` blocks or else balanced by their numbers of parameters.

    Nothing is timed, so that all processes cut alike; ``pipeoptim plan`` measures, and says what to give as ``cut``.

    Args:
        sample: a micro-batch, which shows what the model does.

    Raises:
        ConfigError: no layers are found, too few places where it can be cut, or lengths that are not those of the model.
    """
    splitter = LayerSplitter(model, (sample,), {}, None)
    sizes, n = [sum(own.values()) for own in splitter.weights()], len(splitter.names)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    trains = [bool(trained & own.keys()) for own in splitter.weights()]
    ends = [0, *accumulate(sizes)]
    if lengths and (len(lengths) != stages or sum(lengths) != n):
        raise ConfigError(
            f"cut is {','.join(map(str, lengths))}, must have a number of blocks for each of {counted(stages, 'stage')}, {n} in all"
        )

    def cost(_: int, start: int, end: int) -> float:
        possible = any(trains[start:end]) and (end == n or splitter.may_cut(end - 1))
        return ends[end] - ends[start] if possible else inf

    places = sum(splitter.may_cut(c) for c in range(n - 1))
    found = lengths or (best_cut(n, stages, cost) if stages <= places + 1 else [])
    starts = [0, *accumulate(found)]
    if not found or max(cost(k, *pair) for k, pair in enumerate(pairwise(starts))) == inf:
        wanted = f"by cut {','.join(map(str, lengths))}" if lengths else f"into {counted(stages, 'stage')}"
        raise ConfigError(
            f"the {type(model).__name__} cannot be cut {wanted}: it has {counted(n, 'block')}, and {counted(places, 'place')} between them "
            "where nothing but a layer's output is used later; use fewer stages, or move what is used later (a residual) into the layers"
        )
    costs = [BlockCost(name, 0.0, 0.0, 0, 0, size) for name, size in zip(splitter.names, sizes, strict=True)]
    return partition(model, stages, (sample,), how="layers", costs=costs, pins=starts[1:-1])


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
