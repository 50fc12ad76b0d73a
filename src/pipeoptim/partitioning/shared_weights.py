"""Weights that several blocks use: one copy where these are on one stage, a copy on each stage where they are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

BlockWeights = dict[int, int]
"""The weights of a block: identity of a parameter -> its bytes."""


@dataclass(frozen=True)
class SharedWeight:
    """A weight that several blocks use.

    Attributes:
        blocks: their numbers.
        nbytes: of one copy.
    """

    blocks: tuple[int, ...]
    nbytes: int

    def inside(self, start: int, end: int) -> int:
        """How many of the blocks are among ``start .. end-1``."""
        return sum(start <= block < end for block in self.blocks)


def weights_of(block: nn.Module) -> BlockWeights:
    """The parameters of ``block``."""
    return {id(p): p.nbytes for p in block.parameters()}


def shared_weights(blocks: Sequence[BlockWeights]) -> list[SharedWeight]:
    """Those that more than one of ``blocks`` uses.

    Example:
        >>> shared_weights([{1: 80, 2: 8}, {2: 8}, {1: 80}])
        [SharedWeight(blocks=(0, 2), nbytes=80), SharedWeight(blocks=(0, 1), nbytes=8)]
    """
    uses: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        for key in block:
            uses.setdefault(key, []).append(number)
    return [SharedWeight(tuple(numbers), blocks[numbers[0]][key]) for key, numbers in uses.items() if len(numbers) > 1]
