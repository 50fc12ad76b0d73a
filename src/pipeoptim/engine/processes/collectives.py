"""Plain data and tensors from every process to every process, as torch's object collectives, but never pickled.

A value is a tree as it passes between stages: tensors, None, numbers and strings in tuples, lists and dicts. Tensors arrive on
the CPU. Each call waits for all processes of the group, whose backend must carry tensors of the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.pytree import PLAIN
from pipeoptim.errors import ConfigError


def all_gather_plain(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The ``value`` of every process of ``group``, in their order, on all of them.

    Raises:
        ConfigError: ``value`` holds something that is neither a tensor nor plain data.
    """
    packed = pack(value)
    # Sizes first: a collective needs buffers of one size, and every process packs another number of bytes.
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([packed.numel()]), group=group)
    blocks = [torch.empty(_longest(sizes), dtype=torch.uint8) for _ in sizes]
    dist.all_gather(blocks, _extended(packed, _longest(sizes)), group=group)
    return [unpack(block) for block in blocks]


def gather_plain(value: Any, destination: int, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """The ``value`` of every process on the one with global rank ``destination``; None on the others.

    Raises:
        ConfigError: ``value`` holds something that is neither a tensor nor plain data.
    """
    packed = pack(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([packed.numel()]), group=group)
    blocks = None
    if dist.get_rank() == destination:
        blocks = [torch.empty(_longest(sizes), dtype=torch.uint8) for _ in sizes]
    dist.gather(_extended(packed, _longest(sizes)), blocks, dst=destination, group=group)
    return None if blocks is None else [unpack(block) for block in blocks]


def broadcast_plain(value: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """The ``value`` of the process with global rank ``source``, on all of them.

    Raises:
        ConfigError: ``value`` holds something that is neither a tensor nor plain data.
    """
    packed = pack(value) if dist.get_rank() == source else torch.empty(0, dtype=torch.uint8)
    # Only the source's size counts; the others send nothing and learn from it how much memory to provide.
    size = torch.tensor([packed.numel()])
    dist.broadcast(size, source, group=group)
    block = packed if packed.numel() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(block, source, group=group)
    return unpack(block)


def pack(tree: Any) -> Tensor:
    """``tree`` as one block of bytes that describes itself.

    Example:
        >>> unpack(pack({"loss": 0.5, "weights": (torch.ones(2), None)}))
        {'loss': 0.5, 'weights': (tensor([1., 1.]), None)}
    """
    form, tensors = message.format_of(tree_map(_plain_leaf, tree))
    text = form.describe()
    start = _aligned(_LENGTH + len(text))
    # Zeros, so that the padding between the tensors carries no old memory to other processes.
    block = torch.zeros(start + form.payload, dtype=torch.uint8)
    block[:_LENGTH].view(torch.int64).fill_(len(text))
    block[_LENGTH : _LENGTH + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    message.fill(message.places(block, start, form), tensors)
    return block


def unpack(block: Tensor) -> Any:
    """The tree that :func:`pack` packed into ``block``, which may be longer; its tensors have memory of their own."""
    length = int(block[:_LENGTH].view(torch.int64))
    form = message.Format.parse(bytes(block[_LENGTH : _LENGTH + length].numpy()))
    tree = message.read(block, _aligned(_LENGTH + length), form)
    # Cloned: torch.save writes all the memory behind a view, and a generator's set_state reads from its beginning, wherever it starts.
    return tree_map_only(Tensor, lambda view: view.detach().clone(), tree)


_LENGTH = 8  # bytes of the number that says how long the description is


def _plain_leaf(leaf: Any) -> Any:
    """A NumPy number is a ``float``, and a version of torch a ``str``: as such they arrive."""
    if isinstance(leaf, Tensor) or type(leaf) in PLAIN:
        return leaf
    for kind in (int, float, str):
        if isinstance(leaf, kind):
            return kind(leaf)
    raise ConfigError(f"a {type(leaf).__name__} cannot be sent to the other processes; only tensors and plain data are")


def _aligned(offset: int) -> int:
    return -(-offset // 64) * 64  # where any type of number may begin


def _longest(sizes: list[Tensor]) -> int:
    return max(int(size) for size in sizes)


def _extended(block: Tensor, size: int) -> Tensor:
    """``block`` with zeros behind it: a collective needs the same size from everybody."""
    return block if block.numel() == size else torch.cat([block, block.new_zeros(size - block.numel())])
