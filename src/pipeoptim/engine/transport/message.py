"""How nested tensors become one message and tensors again: a header, and every tensor at a fixed place behind it.

A message is one block of bytes::

    | header, 128 bytes | description, only in a new format | tensor 0 | tensor 1 | ...      each at a multiple of 64 bytes

Its *format* (structure, shapes, types) is described only when it changes: as long as it stays the same, a message costs one copy and
no description.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from time import monotonic_ns
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pipeoptim.engine.transport.pytree import check_leaf, portable
from pipeoptim.engine.transport.treespec import describe_spec, describe_value, parse_spec, parse_value
from pipeoptim.errors import ConfigError, PipeOptimError

HEADER = 128  # bytes, of which 88 are used: tensors behind it begin at a multiple of 64, as vector instructions like it
_MAGIC = 0x50697065_4F707431
# "<": fixed byte order and sizes, without the gaps that a compiler would add.
_HEADER = struct.Struct("<5qd5q")
_CHECKSUM = _HEADER.size - 8  # where it lies
_PADDING = bytes(HEADER - _HEADER.size)


class Message(NamedTuple):
    """What a stage receives from its neighbour.

    Attributes:
        tree: activations or gradients, as the neighbour's compressor packed them.
        flags: bit 0: stop requested.
        loss_scale: with gradients, the loss scale that is in them; with activations, one that overflowed, or 0.
        share: with activations, (rows, of): the micro-batch's rows of those of its mini-batch.
    """

    tree: Any
    flags: int = 0
    loss_scale: float = 0.0
    share: tuple[int, int] = (0, 0)


class Header(NamedTuple):
    """The beginning of a message: 64-bit integers, and a float64 for the loss scale.

    Attributes:
        magic: the same in every message; anything else is not one.
        sequence: messages sent before it in this direction; both ends count.
        flags: bit 0: stop requested.
        following: 0, or the size of the message in a new format that follows this empty one.
        described: in a message in a new format, the length of its description; else 0.
        loss_scale: with gradients, the loss scale that is in them; with activations, one that overflowed, or 0.
        rows, of: with activations, the micro-batch's rows of those of its mini-batch.
        taken: messages received so far in the other direction.
        sent: when, in nanoseconds on the sender's clock.
        checksum: 1 + CRC-32 of everything else in the message; 0 where it has none.
    """

    magic: int
    sequence: int
    flags: int
    following: int
    described: int
    loss_scale: float
    rows: int
    of: int
    taken: int
    sent: int
    checksum: int


@dataclass(frozen=True)
class TensorSlot:
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

    @cached_property
    def slots(self) -> list[TensorSlot]:
        """Of the tensors, in order."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSlot)]

    @cached_property
    def usual(self) -> int | None:
        """-1 for a tensor, n for a list of n leaves, which is what stages usually send; None for any other structure."""
        if self.spec == _leaf_spec():
            return -1 if type(self.leaves[0]) is TensorSlot else None
        return len(self.leaves) if self.leaves and self.spec == _list_spec(len(self.leaves)) else None

    def describe(self) -> bytes:
        """For the other end, which is another process of the same run.

        Raises:
            ConfigError: a container in the tree is of a class that the other process cannot import.
        """
        leaves = [
            {"slot": _describe_slot(leaf)} if isinstance(leaf, TensorSlot) else describe_value(leaf) for leaf in self.leaves
        ]
        return json.dumps([describe_spec(self.spec), leaves], separators=(",", ":")).encode()

    @staticmethod
    def parse(text: bytes) -> Format:
        """The format that :meth:`describe` wrote.

        Where the tensors lie is computed here and not believed, so that no description leads out of the message's memory.

        Raises:
            PipeOptimError: it is damaged.
            ConfigError: it holds a class that this process does not know.
        """
        try:
            node, described = json.loads(text)
            leaves: list[Any] = []
            offset = 0
            for entry in described:
                slot = entry.get("slot") if isinstance(entry, dict) else None
                leaves.append(parse_value(entry) if slot is None else _slot_at(offset, *slot))
                # As format_of() counts, or the two ends would read different bytes.
                offset += 0 if slot is None else _padded_size(leaves[-1].nbytes)
            spec = parse_spec(node)
            if spec.num_leaves != len(leaves):
                raise ValueError(f"{len(leaves)} leaves for a structure of {spec.num_leaves}")
        # Says more than "damaged": which class is missing here.
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, RecursionError) as error:
            raise PipeOptimError(f"a message from another process has no valid description ({error})") from error
        return Format(spec, tuple(leaves), offset)


def _describe_slot(slot: TensorSlot) -> list[Any]:
    return [slot.shape, slot.stride, describe_value(slot.dtype)["dtype"], slot.requires_grad]


def _slot_at(offset: int, shape: list[int], stride: list[int], dtype: str, requires_grad: bool) -> TensorSlot:
    """What :func:`_describe_slot` described, at byte ``offset``.

    Raises:
        ValueError: its elements would overlap or leave gaps, which no tensor that is sent has.
    """
    kind = parse_value({"dtype": dtype})
    count, dense = math.prod(shape), 1
    # From the innermost dimension outwards, each stride must be the product of the lengths inside it.
    for length, step in sorted(zip(shape, stride, strict=True), key=lambda pair: pair[1]):
        if (
            type(length) is not int
            or type(step) is not int
            or not 0 <= length < _FAR
            or not 0 <= step < _FAR
            or (length > 1 and count and step != dense)
        ):
            raise ValueError(f"no dense tensor has shape {shape} and strides {stride}")
        dense *= max(length, 1)
    return TensorSlot(offset, count * kind.itemsize, tuple(shape), tuple(stride), kind, bool(requires_grad))


_FAR = 1 << 62  # beyond all memory


def _padded_size(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """As ``tree_flatten``; the structures that stages usually send are known already: a tensor, or a list of them."""
    if isinstance(tree, Tensor):
        return [tree], _leaf_spec()
    if type(tree) is list and all(value is None or isinstance(value, Tensor) for value in tree):
        return tree, _list_spec(len(tree))
    return tree_flatten(tree)


@cache
def _leaf_spec() -> Any:
    return tree_flatten(None)[1]


@cache
def _list_spec(count: int) -> Any:
    return tree_flatten([None] * count)[1]


def format_of(tree: Any) -> tuple[Format, list[Tensor]]:
    """The format of ``tree`` and its tensors, in a layout that can be sent, in the order of their slots.

    Raises:
        ConfigError: a leaf cannot be sent.
    """
    values, spec = _flatten_tree(tree)
    leaves: list[Any] = []
    tensors: list[Tensor] = []
    offset = 0
    for value in values:
        check_leaf(value)
        if isinstance(value, Tensor):
            # The slot describes what is sent, so that a copy in another layout arrives with its own strides.
            sent = portable(value.detach())
            nbytes = sent.numel() * sent.element_size()
            slot = TensorSlot(offset, nbytes, tuple(sent.shape), sent.stride(), sent.dtype, value.requires_grad)
            leaves.append(slot)
            tensors.append(sent)
            offset += _padded_size(nbytes)
        else:
            leaves.append(value)
    return Format(spec, tuple(leaves), offset), tensors


def unchanged(tree: Any, form: Format) -> list[Tensor] | None:
    """The tensors of ``tree`` where a quick look shows that its format is ``form``; None where :func:`format_of` must tell."""
    if form.usual == -1:
        tree = (tree,)
    elif type(tree) is not list or form.usual != len(tree):
        return None
    tensors = []
    for value, leaf in zip(tree, form.leaves, strict=True):
        # Exact types only: a subclass may mean something else by its shape or its strides.
        if type(leaf) is TensorSlot and type(value) in _PLAIN_TENSORS:
            if value.shape != leaf.shape or value.dtype is not leaf.dtype or value.requires_grad is not leaf.requires_grad:
                return None
            if value.layout is not torch.strided or not value.is_cpu or value.is_neg() or value.is_conj() or value.is_nested:
                return None
            if value.stride() != leaf.stride:
                return None
            tensors.append(value)
        elif value is not None or leaf is not None:
            return None
    return tensors


_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


def header(sequence: int, flags: int, loss_scale: float, share: tuple[int, int], taken: int) -> bytes:
    """The header, as bytes, of a message in the format of the one before it."""
    return _HEADER.pack(_MAGIC, sequence, flags, 0, 0, loss_scale, *share, taken, monotonic_ns(), 0) + _PADDING


def header_in(memory: bytearray | ctypes.Array[ctypes.c_char]) -> Header:
    """The header at the beginning of ``memory``."""
    return Header(*_HEADER.unpack_from(memory))


def empty(form: Format) -> list[Tensor]:
    """New tensors for a message, on the CPU."""
    return [
        # With the sender's strides: channels-last stays so, and the next stage picks the same kernels as in one process.
        torch.empty_strided(slot.shape, slot.stride, dtype=slot.dtype, requires_grad=slot.requires_grad)
        for slot in form.slots
    ]


def tree_of(tensors: list[Tensor], form: Format) -> Any:
    """The tree of a message whose tensors are these."""
    if form.usual == -1:
        return tensors[0]
    if form.usual == len(tensors):
        return tensors
    coming = iter(tensors)
    return tree_unflatten([next(coming) if isinstance(leaf, TensorSlot) else leaf for leaf in form.leaves], form.spec)


def places(block: Tensor, start: int, form: Format) -> list[Tensor | None]:
    """Where the tensors of a message go in ``block``, the payload beginning at byte ``start``; None for empty ones."""
    return [_view_of_slot(block, start, leaf) if leaf.nbytes else None for leaf in form.leaves if isinstance(leaf, TensorSlot)]


def fill(places: list[Tensor | None], tensors: list[Tensor]) -> None:
    """Copy ``tensors`` to their :func:`places`."""
    for place, tensor in zip(places, tensors, strict=True):
        if place is not None:
            place.copy_(tensor)


def read(block: Tensor, start: int, form: Format) -> Any:
    """The tree of a message; its tensors are views of ``block``, leaves of a new graph."""
    values = []
    for leaf in form.leaves:
        if not isinstance(leaf, TensorSlot):
            values.append(leaf)
        elif leaf.nbytes:
            # A view, not a copy: the block of the message lives as long as any of its tensors.
            values.append(_view_of_slot(block, start, leaf).requires_grad_(leaf.requires_grad))
        else:
            empty = torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=block.device)
            values.append(empty.requires_grad_(leaf.requires_grad))
    return tree_unflatten(values, form.spec)


def _view_of_slot(block: Tensor, start: int, slot: TensorSlot) -> Tensor:
    begin = start + slot.offset
    # Possible since slots begin at multiples of 64 bytes, whatever their type.
    flat = block[begin : begin + slot.nbytes].view(slot.dtype)
    return flat.as_strided(slot.shape, slot.stride)


def put_header(
    block: Tensor,
    sequence: int,
    flags: int,
    following: int = 0,
    described: int = 0,
    loss_scale: float = 0.0,
    share: tuple[int, int] = (0, 0),
    taken: int = 0,
) -> None:
    """Write the header of a message; on a GPU in the order of what is computed there, without waiting for it."""
    values = (_MAGIC, sequence, flags, following, described, loss_scale, *share, taken, monotonic_ns(), 0)
    if block.is_cpu:
        # Through numpy, which shares the memory: a tensor of 10 numbers would cost several calls of torch.
        _HEADER.pack_into(cast(Any, block.numpy()), 0, *values)
    else:
        header = torch.frombuffer(bytearray(_HEADER.pack(*values)), dtype=torch.uint8).pin_memory()  # else the copy waits
        block[: _HEADER.size].copy_(header, non_blocking=True)


def checksum(block: Tensor) -> int:
    """What :class:`Header` calls so, of a message in host memory."""
    memory = memoryview(cast(Any, block.numpy()))
    return 1 + zlib.crc32(memory[_HEADER.size :], zlib.crc32(memory[:_CHECKSUM]))


def put_checksum(block: Tensor) -> None:
    """Write it into the header of a complete message."""
    struct.pack_into("<q", cast(Any, block.numpy()), _CHECKSUM, checksum(block))


def get_header(block: Tensor) -> Header:
    """Read the header of a message; on a GPU this waits for it to arrive, and for all that was to be computed before."""
    begin = block if block.is_cpu else block[:HEADER].cpu()
    return Header(*_HEADER.unpack_from(cast(Any, begin.numpy())))


def is_ours(header: Header) -> bool:
    """Whether the bytes are a header at all."""
    return header.magic == _MAGIC
