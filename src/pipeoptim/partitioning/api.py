"""``po.partition``: from a model to stages, with the costs they were chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import nn

from pipeoptim.errors import ConfigError
from pipeoptim.methods import Method, copies, get_method
from pipeoptim.partitioning.balance import best_cut
from pipeoptim.partitioning.profile import BlockCost, profile


@dataclass(frozen=True)
class Partition:
    """A model cut into stages.

    Attributes:
        stages: modules that run one after the other.
        lengths: blocks per stage.
        costs: of the blocks, which the cut was chosen by.
        seconds: F and B of each stage for a mini-batch, on its own device.
        memory_bytes: weights, their copies, gradients and activations of each stage while ``method`` trains.
    """

    stages: list[nn.Module]
    lengths: list[int]
    costs: list[BlockCost]
    seconds: list[float]
    memory_bytes: list[int]

    def to_text(self) -> str:
        """The cut as a picture for the terminal: a bar per stage, as long as the stage takes."""
        longest, start, lines = max(self.seconds) or 1.0, 0, []
        for k, (length, seconds, memory) in enumerate(zip(self.lengths, self.seconds, self.memory_bytes, strict=True)):
            names = (
                f"{self.costs[start].name} .. {self.costs[start + length - 1].name}" if length > 1 else self.costs[start].name
            )
            bar = "#" * max(1, round(40 * seconds / longest))
            lines.append(f"stage {k}  {bar:40s} {seconds * 1e3:8.2f} ms {memory / 2**20:8.1f} MiB  {length:3d} blocks: {names}")
            start += length
        return "\n".join(lines)


def partition(
    model: nn.Module | Sequence[nn.Module],
    num_stages: int,
    sample_args: tuple[Any, ...] = (),
    *,
    costs: Sequence[BlockCost] | None = None,
    speeds: Sequence[float] | None = None,
    memory: Sequence[int] | None = None,
    pins: Sequence[int] = (),
    method: str | Method = "pipeoptim",
    microbatches: int = 1,
) -> Partition:
    """Cut ``model`` into ``num_stages`` contiguous stages so that the slowest one is as fast as possible.

    The time of stage k is the sum of its blocks' seconds over ``speeds[k]``. Its memory is what ``method`` needs there: copies
    of the weights, one gradient, and the activations of the micro-batches in flight. The cut is exact, not a heuristic.

    Args:
        model: an ``nn.Sequential`` (or a container with length and slices), or a list of blocks that run one after the other.
        num_stages: depth D.
        sample_args: one mini-batch as the model takes it, to measure with; not needed when ``costs`` are given.
        costs: of the blocks, from :func:`~pipeoptim.partitioning.profile` or your own.
        speeds: of the devices, relative to the one measured; all 1 by default.
        memory: bytes of each device; unlimited by default.
        pins: block numbers before which a stage must begin.
        method, microbatches: what will train, for the memory.

    Raises:
        ConfigError: more stages than blocks, lists of the wrong length, or no cut fits.

    Example:
        >>> import torch
        >>> blocks = [torch.nn.Linear(64, 64) for _ in range(6)]
        >>> cut = partition(torch.nn.Sequential(*blocks), 3, (torch.ones(8, 64),))
        >>> sum(cut.lengths), len(cut.stages)
        (6, 3)
    """
    blocks, names = _blocks(model)
    _check(len(blocks), num_stages, speeds, memory, pins)
    method = get_method(method)
    if costs is None:
        if not sample_args:
            raise ConfigError("neither sample_args nor costs were given; pass one mini-batch as sample_args to measure with")
        costs = profile(blocks, sample_args, names)
    if len(costs) != len(blocks):
        raise ConfigError(f"costs has {len(costs)} entries for {len(blocks)} blocks; give one per block")
    scale = _Scale(list(costs), method, num_stages, microbatches, speeds or [1.0] * num_stages)
    limits: Sequence[float] = memory or [inf] * num_stages
    wanted = set(pins)

    def cost(k: int, start: int, end: int) -> float:
        if any(start < pin < end for pin in wanted) or scale.memory(k, start, end) > limits[k]:
            return inf
        return scale.seconds(k, start, end)

    lengths = best_cut(len(blocks), num_stages, cost)
    starts = [sum(lengths[:k]) for k in range(num_stages)]
    ranges = [(k, start, start + length) for k, (start, length) in enumerate(zip(starts, lengths, strict=True))]
    return Partition(
        [_piece(model, start, end) for _, start, end in ranges],
        lengths,
        list(costs),
        [scale.seconds(*r) for r in ranges],
        [scale.memory(*r) for r in ranges],
    )


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


def _blocks(model: nn.Module | Sequence[nn.Module]) -> tuple[list[nn.Module], list[str]]:
    if isinstance(model, nn.Module):
        if not (hasattr(model, "__len__") and hasattr(model, "__getitem__")):
            raise ConfigError(
                f"the model is a {type(model).__name__}, which cannot be sliced; pass an nn.Sequential or the list of its "
                "blocks in the order in which they run"
            )
        container: Any = model
        blocks = [container[i] for i in range(len(container))]
    else:
        blocks = list(model)
    return blocks, [f"{n} {type(block).__name__}" for n, block in enumerate(blocks)]


def _piece(model: Any, start: int, end: int) -> nn.Module:
    if isinstance(model, nn.Module):
        return model[start:end]  # type: ignore[index,no-any-return]
    return nn.Sequential(*list(model)[start:end])


def _check(blocks: int, stages: int, speeds: Sequence[float] | None, memory: Sequence[int] | None, pins: Sequence[int]) -> None:
    if not 1 <= stages <= blocks:
        raise ConfigError(f"num_stages is {stages}, but the model has {blocks} blocks; use 1 .. {blocks}")
    for what, values in (("speeds", speeds), ("memory", memory)):
        if values is not None and (len(values) != stages or min(values) <= 0):
            raise ConfigError(f"{what} is {list(values)}, must be {stages} positive numbers, one per stage")
    bad = [pin for pin in pins if not 0 < pin < blocks]
    if bad or len(set(pins)) > stages - 1:
        raise ConfigError(
            f"pins is {list(pins)}, must be at most {stages - 1} block numbers from 1 .. {blocks - 1}: where a stage must begin"
        )
