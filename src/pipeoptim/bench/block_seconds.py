"""Seconds of F and B of every block, measured where they run: inside one stage that holds all of them.

Blocks that are stages of their own find what the block before has just written gone from the caches, start a backward each, and pay at
each end for what a stage does to its messages. Here the engine trains one stage, and marks split its F and B::

    F   |--- block 0 ---|-- block 1 --|------ block 2, loss ------|        a mark when a block returns
    B   |------ loss, block 2 ------|-- block 1 --|--- block 0 ---|        a mark when the gradient of what it returned is complete
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from torch import nn

from pipeoptim.bench.measured_model import MeasuredModel
from pipeoptim.engine import Emulator, Trace
from pipeoptim.engine.trace import TraceRow
from pipeoptim.engine.transport.pytree import as_args, differentiable
from pipeoptim.errors import ConfigError

SKIP = 3
"""Mini-batches before anything counts: memory is allocated, clocks and caches are warm."""


class BlockSeconds(NamedTuple):
    """Median seconds of every block for a micro-batch, and the spread of F and B of all of them together, as a share."""

    forward: list[float]
    backward: list[float]
    spread: float


class BlockMarks:
    """Puts marks into the trace of a stage, by hooks on its blocks.

    They are numbered in the order of calls, since a module may be several blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], row: TraceRow) -> None:
        self.row, self._next = row, 0
        for block in {id(block): block for block in blocks}.values():
            block.register_forward_hook(self._returned)
        self._count = len(blocks)

    def _returned(self, _: nn.Module, __: Any, output: Any) -> None:
        n, self._next = self._next, (self._next + 1) % self._count
        self._mark("block F", n)
        for tensor in differentiable(as_args(output)):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: self._mark("block B", n))

    def _mark(self, what: str, n: int) -> None:
        self.row.add(what, n, self.row.now())


def traced_blocks(stage: nn.Module, blocks: Sequence[nn.Module], work: MeasuredModel, m: int, repeats: int) -> BlockSeconds:
    """Of the blocks that ``stage`` calls one after the other, with M = ``m``.

    Raises:
        ConfigError: it calls them otherwise.
    """
    trace = Trace(steps=repeats, skip=SKIP)
    pipe = Emulator([stage], work.optimizer, work.loss_fn, "1f1b", m, trace=trace)
    row = trace._rows[0]
    BlockMarks(blocks, row)
    for _ in range(SKIP + repeats):
        pipe.step(*work.args, target=work.target, **work.kwargs)
    pipe.drain()
    forward, backward = _split(row.to_json()["spans"], len(blocks))
    return BlockSeconds(_medians(forward, m), _medians(backward, m), _spread(forward, backward, m))


def _split(spans: Sequence[Sequence[Any]], count: int) -> tuple[list[list[float]], list[list[float]]]:
    """Of each F and each B, what every block took: the marks of an action come before its own span, which is noted when it ends."""
    found: dict[str, list[list[float]]] = {"F": [], "B": []}
    marks: dict[int, int] = {}
    for what, number, begin, end, *_ in spans:
        if what.startswith("block"):
            marks.setdefault(number, begin)  # of several outputs the one whose gradient is complete first
            continue
        if what == "F":
            if sorted(marks) != list(range(count)):
                raise ConfigError(
                    f"a forward of the model called {len(marks)} of its {count} blocks, must call each of them once; call blocks as "
                    "block(x) and not by block.forward(x)"
                )
            ends = [begin, *(marks[n] for n in range(count - 1)), end]
            found["F"].append([(b - a) * 1e-9 for a, b in pairwise(ends)])
        elif what == "B":
            # Block n + 1 ends where the gradient of n is complete; where none is needed, nothing is left to do for those before.
            ends = [end, *(marks.get(n, end) for n in range(count - 1)), begin]
            found["B"].append([max(0, a - b) * 1e-9 for a, b in pairwise(ends)])
        marks = {}
    return found["F"], found["B"]


def _medians(actions: list[list[float]], m: int) -> list[float]:
    """Of the mean in a mini-batch, block by block."""
    return [median(sum(one) / m for one in _turns(own, m)) for own in zip(*actions, strict=True)]


def _spread(forward: list[list[float]], backward: list[list[float]], m: int) -> float:
    """Half of the middle 68 % of a mini-batch's seconds, as a share of their median."""
    whole = sorted(sum(turn) for turn in _turns([sum(f) + sum(b) for f, b in zip(forward, backward, strict=True)], m))
    last = len(whole) - 1
    return (whole[round(0.84 * last)] - whole[round(0.16 * last)]) / 2 / median(whole)


def _turns(values: Sequence[float], m: int) -> list[Sequence[float]]:
    return [values[n : n + m] for n in range(0, len(values), m)]
