"""What stages keep of a micro-batch from F to B: what autograd saves, what they were given and what they return, each memory once.

The blocks of a model run one after the other, and every storage that autograd saves is noted with the block that saved it. What two
neighbours both keep (a ReLU its output, the layer behind it the same as its input) counts once where they are on one stage, and twice
where a message lies between them::

    stage of blocks a .. b-1:   its input   +   what they save   +   its output        each storage once
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeoptim.engine.transport.pytree import as_args, differentiable

LEAST = 64
"""Smaller storages are single numbers, such as losses."""


def kept_bytes(
    blocks: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss_fn: Callable[..., Any],
    target: Any,
) -> list[tuple[int, int]]:
    """Of each block: what a stage of it alone keeps, and by how much less it is where the block before is on the same stage.

    Args:
        blocks: in their order.
        args, kwargs, target: a micro-batch, whose memory is the caller's own and does not count.
        loss_fn: is part of the last block.
    """
    row = _Row()
    with torch.random.fork_rng(), torch.enable_grad():
        value: Any = args
        for block in blocks:
            with row.block(block, (args, kwargs, target)):
                output = block(*as_args(value), **kwargs)
                if block is blocks[-1]:
                    output = loss_fn(output, target)
            row.outputs.append(_storages(differentiable(as_args(output))))
            row.messages.append([t for t in tree_leaves(output) if isinstance(t, Tensor)])
            value, kwargs = output, {}
    alone = [row.kept(n, n + 1) for n in range(len(blocks))]
    pairs = [0, *(alone[n - 1] + alone[n] - row.kept(n - 1, n + 1) for n in range(1, len(blocks)))]
    return list(zip(alone, pairs, strict=True))


class _Row:
    """Blocks that have run, by index.

    Attributes:
        saved: storages that autograd saved, and their bytes.
        outputs: storages that the backward starts from.
        messages: tensors that the next block was given; they keep their memory, so that no address comes twice.
    """

    def __init__(self) -> None:
        self.saved: list[dict[int, int]] = []
        self.outputs: list[dict[int, int]] = []
        self.messages: list[list[Tensor]] = []

    def block(self, block: nn.Module, users: Any) -> AbstractContextManager[Any]:
        """While it runs."""
        apart = _storages([*block.parameters(), *block.buffers(), *(t for t in tree_leaves(users) if isinstance(t, Tensor))])
        found: dict[int, int] = {}
        self.saved.append(found)

        def note(t: Tensor) -> Tensor:
            found.update((at, size) for at, size in _storages([t]).items() if at not in apart)
            return t

        return torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)

    def kept(self, first: int, end: int) -> int:
        """Bytes that a stage of the blocks ``first`` to ``end - 1`` keeps."""
        inside = {at: size for n in range(first, end) for at, size in self.saved[n].items()}
        received = self.messages[first - 1] if first else []
        total = sum(t.nbytes for t in received if t.requires_grad or t.untyped_storage().data_ptr() in inside)
        inside |= self.outputs[end - 1]
        apart = _storages(received)
        return total + sum(size for at, size in inside.items() if at not in apart and size >= LEAST)


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
