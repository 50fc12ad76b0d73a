"""``po.partition``: from a model to stages, with the costs they were chosen by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Protocol

from torch import nn

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, copies, get_method
from pipeoptim.partitioning.balance import best_cut
from pipeoptim.partitioning.blocks import Blocks, sliceable
from pipeoptim.partitioning.layered import Layered
from pipeoptim.partitioning.places import find_places, untie
from pipeoptim.partitioning.profile import BlockCost
from pipeoptim.partitioning.result import Partition

HOW = ("auto", "blocks", "layers", "trace")


class Splitter(Protocol):
    """A model seen as a row of blocks."""

    names: list[str]
    measurable: bool

    def may_cut(self, c: int) -> bool: ...
    def costs(self) -> list[BlockCost]: ...
    def weight_bytes(self) -> list[int]: ...
    def stages(self, ranges: Sequence[tuple[int, int]]) -> list[nn.Module]: ...
    def check(self, stages: Sequence[nn.Module]) -> None: ...


def partition(
    model: nn.Module | Sequence[nn.Module],
    num_stages: int,
    sample_args: tuple[Any, ...] = (),
    sample_kwargs: Mapping[str, Any] | None = None,
    *,
    how: str = "auto",
    layers: str | Sequence[str] | None = None,
    costs: Sequence[BlockCost] | None = None,
    speeds: Sequence[float] | None = None,
    memory: Sequence[int] | None = None,
    pins: Sequence[int | str] = (),
    method: str | Method = "pipeoptim",
    microbatches: int = 1,
) -> Partition:
    """Cut ``model`` into ``num_stages`` contiguous stages so that the slowest one is as fast as possible.

    The time of stage k is the sum of its blocks' seconds over ``speeds[k]``. Its memory is what ``method`` needs there: copies
    of the weights, one gradient, and the activations of the micro-batches in flight. The cut is exact, not a heuristic.

    Args:
        model: an ``nn.Sequential`` (or a container with length and slices), a list of blocks that run one after the other, or
            an ordinary model with layers somewhere inside it, such as those of Hugging Face Transformers.
        num_stages: depth D.
        sample_args, sample_kwargs: one mini-batch as the model takes it, to measure with and to see what the model does. For
            blocks it is not needed when ``costs`` are given or all cuts are pinned.
        how: ``"blocks"``, ``"layers"`` (see :mod:`pipeoptim.partitioning.layered`), ``"trace"``, or ``"auto"``: blocks where
            the model has them, else layers.
        layers: names of the lists of layers, or of single modules, behind which the model may be cut; found by itself.
        costs: of the blocks, from :func:`~pipeoptim.partitioning.profile` or your own.
        speeds: of the devices, relative to the one measured; all 1 by default.
        memory: bytes of each device; unlimited by default.
        pins: numbers or names of blocks with which a stage must begin.
        method, microbatches: what will train, for the memory.

    Raises:
        ConfigError: more stages than blocks, lists of the wrong length, no cut fits, or the model cannot be cut like this.

    Example:
        >>> import torch
        >>> blocks = [torch.nn.Linear(64, 64) for _ in range(6)]
        >>> cut = partition(torch.nn.Sequential(*blocks), 3, (torch.ones(8, 64),))
        >>> sum(cut.lengths), len(cut.stages)
        (6, 3)
    """
    how, splitter = _splitter(model, sample_args, dict(sample_kwargs or {}), how, layers)
    blocks = len(splitter.names)
    numbers = _numbers(pins, splitter.names)
    _check(blocks, num_stages, speeds, memory, numbers)
    method = get_method(method)
    if costs is None:
        pinned = len(numbers) == num_stages - 1 and memory is None
        costs = _unmeasured(splitter) if pinned and not splitter.measurable else splitter.costs()
    if len(costs) != blocks:
        raise ConfigError(f"costs has {len(costs)} entries for {blocks} blocks; give one per block")
    scale = _Scale(list(costs), method, num_stages, microbatches, speeds or [1.0] * num_stages)
    ranges = _choose(splitter, scale, num_stages, memory or [inf] * num_stages, numbers)
    shared = splitter.stages([(start, end) for _, start, end in ranges])
    whole = model if isinstance(model, nn.Module) else nn.ModuleList(model)
    names, tied = find_places(whole, shared)
    stages = untie(shared)
    splitter.check(stages)
    return Partition(
        stages,
        [end - start for _, start, end in ranges],
        list(costs),
        [scale.seconds(*r) for r in ranges],
        [scale.memory(*r) for r in ranges],
        names,
        tied,
        how,
    )


def _splitter(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: str, layers: Any) -> tuple[str, Splitter]:
    if how not in HOW:
        raise ConfigError(f"how is {how!r}, must be one of {', '.join(HOW)}")
    given = isinstance(args, tuple)
    if not given:
        raise ConfigError(f"sample_args is a {type(args).__name__}, must be a tuple of the model's arguments: (x,)")
    if how == "auto":
        how = "blocks" if layers is None and (not isinstance(model, nn.Module) or sliceable(model)) else "layers"
    if how == "blocks":
        if isinstance(model, nn.Module) and not sliceable(model):
            raise ConfigError(
                f'how is "blocks" and the model is a {type(model).__name__}, which cannot be sliced; pass an nn.Sequential or '
                'the list of its blocks in the order in which they run, or how="layers"'
            )
        return how, Blocks(model, args)
    if not isinstance(model, nn.Module):
        raise ConfigError(f'how is "{how}" and the model is a {type(model).__name__}, must be an nn.Module')
    if not args and not kwargs:
        raise ConfigError(
            f"the model is a {type(model).__name__}, which cannot be sliced, and no sample_args were given; pass one mini-batch, "
            "from which its layers are found, or pass an nn.Sequential or the list of its blocks"
        )
    return how, Layered(model, args, kwargs, layers)


def _choose(
    splitter: Splitter, scale: _Scale, stages: int, limits: Sequence[float], pins: set[int]
) -> list[tuple[int, int, int]]:
    """The best cut: (stage, first block, block after the last) for each stage."""
    blocks = len(splitter.names)
    allowed = [splitter.may_cut(c) for c in range(blocks - 1)] + [True]
    if sum(allowed) < stages:
        raise ConfigError(
            f"num_stages is {stages}, but only {sum(allowed) - 1} of the {blocks - 1} places between the model's layers can be cut: "
            "elsewhere more than a layer's own output is used later; use fewer stages, or name other layers"
        )

    def cost(k: int, start: int, end: int) -> float:
        if any(start < pin < end for pin in pins) or not allowed[end - 1] or scale.memory(k, start, end) > limits[k]:
            return inf
        return scale.seconds(k, start, end)

    lengths = best_cut(blocks, stages, cost)
    starts = [sum(lengths[:k]) for k in range(stages)]
    return [(k, start, start + length) for k, (start, length) in enumerate(zip(starts, lengths, strict=True))]


class _Scale:
    """Seconds and bytes of a range of blocks as a stage."""

    def __init__(self, costs: list[BlockCost], method: Method, depth: int, m: int, speeds: Sequence[float]) -> None:
        self.costs, self.speeds, self.m = costs, speeds, m
        program = method.program(depth, m)
        self.copies = [copies(method, depth, m, k) for k in range(depth)]
        self.in_flight = [program.in_flight(k) for k in range(depth)]

    def seconds(self, k: int, start: int, end: int) -> float:
        return sum(c.seconds for c in self.costs[start:end]) / self.speeds[k]

    def memory(self, k: int, start: int, end: int) -> int:
        weights = sum(c.weight_bytes for c in self.costs[start:end])
        saved = sum(c.saved_bytes for c in self.costs[start:end]) // self.m
        return weights * (self.copies[k] + 1) + saved * self.in_flight[k]


def _unmeasured(splitter: Splitter) -> list[BlockCost]:
    """Costs where nothing is to be chosen: bytes of the weights, no seconds."""
    return [BlockCost(name, 0.0, 0.0, 0, 0, size) for name, size in zip(splitter.names, splitter.weight_bytes(), strict=True)]


def _numbers(pins: Sequence[int | str], names: Sequence[str]) -> set[int]:
    unknown = [pin for pin in pins if isinstance(pin, str) and pin not in names]
    if unknown:
        raise ConfigError(f"pins names {unknown[0]!r}, which is not a block; known: {', '.join(names)}")
    return {list(names).index(pin) if isinstance(pin, str) else pin for pin in pins}


def _check(blocks: int, stages: int, speeds: Sequence[float] | None, memory: Sequence[int] | None, pins: set[int]) -> None:
    if not 1 <= stages <= blocks:
        raise ConfigError(f"num_stages is {stages}, but the model has {blocks} blocks; use 1 .. {blocks}")
    for what, values in (("speeds", speeds), ("memory", memory)):
        if values is not None and (len(values) != stages or min(values) <= 0):
            raise ConfigError(f"{what} is {list(values)}, must be {stages} positive numbers, one per stage")
    bad = [pin for pin in pins if not 0 < pin < blocks]
    if bad or len(pins) > stages - 1:
        raise ConfigError(
            f"pins is {sorted(pins)}, must be at most {stages - 1} block numbers from 1 .. {blocks - 1}: where a stage must begin"
        )
