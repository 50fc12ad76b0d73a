"""How nested tensors become one message and tensors again: a header, and every tensor at a fixed place behind it.

A message is one block of bytes: 64 bytes of header, then the tensors, each at a multiple of 64 bytes. Its *format* (structure,
shapes, types) is sent only when it changes; as long as it stays the same a message costs one copy and no description.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipeoptim.engine.tree import check_leaf, portable
from pipeoptim.errors import ConfigError

HEADER = 64
_MAGIC = 0x50697065_4F707431


class Header(NamedTuple):
    """The eight 64-bit integers of a message.

    Attributes:
        magic: tells a message from noise.
        sequence: messages sent before it in this direction; both ends count.
        flags: bit 0: stop requested.
        following: 0, or the size of the message in a new format that follows this empty one.
        described: in a message in a new format, the length of its description; else 0.
        scale: the bits of a float64: see :attr:`loss_scale`.
        rows, of: with activations, which part of its mini-batch the micro-batch is.
    """

    magic: int
    sequence: int
    flags: int
    following: int
    described: int
    scale: int
    rows: int
    of: int

    @property
    def loss_scale(self) -> float:
        """With gradients, the loss scale that is in them; with activations, one that was too large, or 0."""
        return float(struct.unpack("<d", struct.pack("<q", self.scale))[0])


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in the message."""

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True)
class Format:
    """The structure of a message: a tree whose tensor leaves are slots and whose other leaves are plain values."""

    spec: Any
    leaves: tuple[Any, ...]
    payload: int

    @property
    def size(self) -> int:
        """Bytes of a message in this format, its header included."""
        return HEADER + self.payload

    def describe(self) -> bytes:
        """For the other end, which is another process of the same run.

        Raises:
            ConfigError: a container in the tree is of a class that the other process cannot import.
        """
        try:
            return pickle.dumps((tree_unflatten(self.leaves, self.spec), self.payload), protocol=5)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"a stage returned a structure that cannot be described to the next stage ({error}); define its class at the top "
                "of a module, or return tuples, lists and dicts"
            ) from error

    @staticmethod
    def parse(text: bytes) -> Format:
        """The format that :meth:`describe` wrote."""
        tree, payload = pickle.loads(text)
        leaves, spec = tree_flatten(tree)
        return Format(spec, tuple(leaves), payload)


def format_of(tree: Any) -> tuple[Format, list[Tensor]]:
    """The format of ``tree`` and its tensors in a layout that travels, in the order of their slots.

    Raises:
        ConfigError: a leaf cannot be sent.
    """
    values, spec = tree_flatten(tree)
    leaves: list[Any] = []
    tensors: list[Tensor] = []
    offset = 0
    for value in values:
        check_leaf(value)
        if isinstance(value, Tensor):
            sent = portable(value.detach())
            nbytes = sent.numel() * sent.element_size()
            slot = Slot(offset, nbytes, tuple(sent.shape), sent.stride(), sent.dtype, value.requires_grad)
            leaves.append(slot)
            tensors.append(sent)
            offset += -(-nbytes // 64) * 64
        else:
            leaves.append(value)
    return Format(spec, tuple(leaves), offset), tensors


def write(block: Tensor, start: int, form: Format, tensors: list[Tensor]) -> None:
    """Copy ``tensors`` to their slots in ``block``, the payload beginning at byte ``start``."""
    slots = [leaf for leaf in form.leaves if isinstance(leaf, Slot)]
    for slot, tensor in zip(slots, tensors, strict=True):
        if slot.nbytes:
            _at(block, start, slot).copy_(tensor)


def read(block: Tensor, start: int, form: Format) -> Any:
    """The tree of a message; its tensors are views of ``block``, leaves of a new graph."""
    values = []
    for leaf in form.leaves:
        if not isinstance(leaf, Slot):
            values.append(leaf)
        elif leaf.nbytes:
            values.append(_at(block, start, leaf).requires_grad_(leaf.requires_grad))
        else:
            empty = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=block.device)
            values.append(empty.requires_grad_(leaf.requires_grad))
    return tree_unflatten(values, form.spec)


def _at(block: Tensor, start: int, slot: Slot) -> Tensor:
    begin = start + slot.offset
    flat = block[begin : begin + slot.nbytes].view(slot.dtype)
    return flat.as_strided(slot.shape, slot.stride, flat.storage_offset())


def put_header(
    block: Tensor,
    sequence: int,
    flags: int,
    following: int = 0,
    described: int = 0,
    loss_scale: float = 0.0,
    part: tuple[int, int] = (0, 0),
) -> None:
    """Write the header of a message."""
    (scale,) = struct.unpack("<q", struct.pack("<d", loss_scale))
    values = [_MAGIC, sequence, flags, following, described, scale, *part]
    block[:HEADER].view(torch.int64).copy_(torch.tensor(values, dtype=torch.int64))


def get_header(block: Tensor) -> Header:
    """Read the header of a message; on a GPU this waits for it to arrive."""
    return Header(*block[:HEADER].view(torch.int64).tolist())


def is_ours(header: Header) -> bool:
    """Whether the bytes are a header at all."""
    return header.magic == _MAGIC
