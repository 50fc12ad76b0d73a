"""A sequence whose blocks may hand on several tensors: models with masks or auxiliary heads stay flat."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Carry", "Chain"]


class Chain(nn.Sequential):
    """``nn.Sequential`` where a tuple that a block returns becomes the positional arguments of the next one.

    Slices are chains, so ``Chain(a, b, c)[:2]`` and ``[2:]`` are two stages; a stage's tuple output becomes
    the arguments of the next stage in the same way.

    >>> import torch
    >>> both = Chain(Carry(nn.Identity()), Carry(nn.Tanh()))
    >>> [tuple(t.shape) for t in both(torch.zeros(2, 3), torch.zeros(2))]
    [(2, 3), (2,)]
    """

    def forward(self, *args: Any) -> Any:
        for block in self:
            out = block(*args)
            args = out if isinstance(out, tuple) else (out,)
        return args if len(args) != 1 else args[0]


class Carry(nn.Module):
    """Applies ``net`` to the first tensor and hands the others on unchanged.

    It adds no level of its own to a model of plain blocks: with a single argument the output is a tensor.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *carried: Tensor) -> Tensor | tuple[Tensor, ...]:
        out: Tensor = self.net(x)
        return (out, *carried) if carried else out
