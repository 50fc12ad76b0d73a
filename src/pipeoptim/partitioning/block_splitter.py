"""A model that is a list of blocks already, as blocks that can be cut apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pipeoptim.engine.transport.pytree import as_args
from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.arguments import microbatch
from pipeoptim.partitioning.block_costs import BlockCost, profile
from pipeoptim.partitioning.shared_weights import BlockWeights, weights_of


def sliceable(model: Any) -> bool:
    """Whether ``model`` is a container whose slices are modules: an ``nn.Sequential``, or one with length and slices."""
    if isinstance(model, nn.ModuleList):
        return False
    return isinstance(model, nn.Module) and hasattr(model, "__len__") and hasattr(model, "__getitem__")


class BlockRun(nn.Module):
    """Blocks one after the other; a tuple that one returns becomes the positional arguments of the next.

    Each block is a child with the name it has in ``blocks``.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value: Any = args
        for block in self.children():
            value, kwargs = block(*as_args(value), **kwargs), {}
        return value


class BlockSplitter:
    """Blocks as they are given.

    Args:
        model: an ``nn.Sequential``, a container with length and slices, or a list of modules.
        args: input of the first block.
        microbatches: what runs when costs are measured.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], args: tuple[Any, ...], microbatches: int = 1) -> None:
        container: Any = model
        self.model, self.m, self.measurable = container, microbatches, bool(args)
        self._microbatch = tuple(microbatch((list(args), {}), microbatches)[0])
        self.blocks: list[nn.Module] = [container[i] for i in range(len(container))]
        self.names = [f"{n} {type(block).__name__}" for n, block in enumerate(self.blocks)]

    def may_cut(self, c: int) -> bool:
        """Between any two."""
        return True

    def costs(self) -> list[BlockCost]:
        """Measured on the blocks' device."""
        if not self.measurable:
            raise ConfigError("neither sample_args nor costs were given; pass one mini-batch as sample_args to measure with")
        return profile(self.blocks, self._microbatch, self.names, microbatches=self.m)

    def weights(self) -> list[BlockWeights]:
        """Those of each block."""
        return [weights_of(block) for block in self.blocks]

    def stages(self, ranges: Sequence[tuple[int, int]]) -> list[nn.Module]:
        """One stage per range of blocks; they hold the model's own modules."""
        if isinstance(self.model, nn.Module):
            return [self.model[start:end] for start, end in ranges]  # type: ignore[index]
        return [BlockRun({str(i): self.blocks[i] for i in range(start, end)}) for start, end in ranges]

    def check(self, stages: Sequence[nn.Module]) -> None:
        """Nothing can differ."""
