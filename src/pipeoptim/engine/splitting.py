"""How one value becomes M slices: what a row is in tensors, arrays, lists and structures of them.

=====================================  ==================================================================================
tensor, NumPy array                    rows lie along dimension 0; an array becomes a tensor
list                                   one entry per row
tuple of dicts, texts, numbers, or     one entry per row
anything else that cannot be cut
other tuple, named tuple, dict         structure: what it holds is cut by these rules
None, text, number, dtype, function    every micro-batch gets it
:mod:`~pipeoptim.engine.marks`         as the mark says; a list that holds marks is structure
=====================================  ==================================================================================

The rules look at types, not at lengths: a batch whose size happens to equal the length of a tuple must not be cut in
another way than the batch before it.
"""

from __future__ import annotations

import enum
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from pipeoptim.engine.marks import MARKS, Along, MicroBatches, Whole
from pipeoptim.errors import ConfigError, counted, first_line

Rows = tuple[int, ...]
"""Rows of each of the M micro-batches; empty where nothing says how many there are."""

_NUMBERS = (type(None), bool, int, float, complex, str, bytes, enum.Enum)
_CONSTANTS = (*_NUMBERS, torch.dtype, torch.device, torch.layout, torch.Size, torch.Generator)


@dataclass(frozen=True)
class Slices:
    """What each micro-batch gets of a value, and all the different numbers of rows that were found in it."""

    values: Sequence[Any]
    rows: tuple[Rows, ...] = ()


def split(name: str, value: Any, m: int) -> Slices:
    """What each of ``m`` micro-batches gets of ``value``, which messages call ``name``.

    Raises:
        ConfigError: it holds something that cannot be cut.
    """
    if isinstance(value, Tensor):  # nearly always
        return _cut_tensor(name, value, m, 0)
    # Before anything is cut: an ambiguous tuple must not be guessed at.
    _check_tuples(name, value)
    leaves, spec = tree_flatten(value, is_leaf=_is_leaf)
    return _joined_slices([_slices_of_leaf(name, leaf, m) for leaf in leaves], spec, m)


def _joined_slices(columns: list[Slices], spec: TreeSpec, m: int) -> Slices:
    # Column by column in, micro-batch by micro-batch out.
    values = [tree_unflatten([column.values[i] for column in columns], spec) for i in range(m)]
    return Slices(values, tuple(dict.fromkeys(rows for column in columns for rows in column.rows)))


def as_fed(name: str, value: Any) -> Any:
    """``value`` for a mini-batch of one micro-batch: nothing is cut, marks are taken off and arrays become tensors.

    Raises:
        ConfigError: :class:`MicroBatches` with several entries, or an array that no tensor can hold.
    """

    def leaf(found: Any) -> Any:
        if isinstance(found, MicroBatches):
            return as_fed(name, _checked_entries(name, found, 1)[0])
        if isinstance(found, Along):
            return as_fed(name, found.value)
        return found.value if isinstance(found, Whole) else as_tensor(name, found)

    return tree_map(leaf, value, is_leaf=_is_leaf)


def as_tensor(name: str, value: Any) -> Any:
    """A NumPy array as a tensor with a copy of its numbers; anything else as it is.

    Raises:
        ConfigError: no tensor can hold it.
    """
    if not _is_numpy(value):
        return value
    try:
        # torch would take the numbers of a masked array and drop the mask in silence.
        if hasattr(value, "mask"):
            raise TypeError("a tensor has no mask")
        return torch.from_numpy(value.copy())  # arrays may be read-only or have negative strides, tensors not
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is a NumPy array of {value.dtype}, which cannot become a tensor ({first_line(error)}); give a list with "
            "one entry per row, or a tensor"
        ) from error


def row_counts(rows: int, m: int) -> Rows:
    """Rows of each of ``m`` micro-batches, as ``torch.tensor_split`` cuts: the first ones have one more.

    >>> row_counts(8, 3)
    (3, 3, 2)
    """
    return tuple((rows + m - 1 - i) // m for i in range(m))


def _slices_of_leaf(name: str, leaf: Any, m: int) -> Slices:
    """``leaf`` is what :func:`_is_leaf` stops at, or what is no container."""
    # Marks first: what the user says goes before any rule about types.
    if isinstance(leaf, Whole):
        return Slices([leaf.value] * m)
    if isinstance(leaf, MicroBatches):
        return _slices_given(name, leaf, m)
    if isinstance(leaf, Along):
        return _slices_along(name, leaf, m)
    if isinstance(leaf, Tensor) or _is_numpy(leaf):
        return _cut_tensor(name, as_tensor(name, leaf), m, 0)
    if isinstance(leaf, (list, tuple, deque)):
        return _cut_list(list(leaf), m, tuple if isinstance(leaf, tuple) else list)
    if isinstance(leaf, _CONSTANTS) or callable(leaf) or _is_numpy_scalar(leaf):
        return Slices([leaf] * m)
    wanted = "dict(...) of it" if isinstance(leaf, Mapping) else "tensors, a list with one entry per row"
    raise ConfigError(
        f"{name} holds a {type(leaf).__name__}, whose rows are unknown, so it cannot be split into {counted(m, 'micro-batch')}; give "
        f"{wanted}, or pipeoptim.MicroBatches that you split yourself; wrap it in pipeoptim.Whole if all shall get it"
    )


def _cut_tensor(name: str, tensor: Tensor, m: int, dim: int) -> Slices:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise ConfigError(
            f"{name} holds a tensor of layout {tensor.layout}, which cannot be split into {counted(m, 'micro-batch')}; "
            "cut it yourself and give pipeoptim.MicroBatches"
        )
    if not -tensor.dim() <= dim < tensor.dim():
        lacks = "no batch dimension" if tensor.dim() == 0 else f"no dimension {dim}, its shape is {tuple(tensor.shape)}"
        raise ConfigError(
            f"a tensor in {name} has {lacks}; it cannot be split into {counted(m, 'micro-batch')}. "
            "Wrap it in pipeoptim.Whole if all of them shall get it"
        )
    # Views: nothing is copied, and uneven sizes are those of row_counts().
    return Slices(tensor.tensor_split(m, dim), (row_counts(tensor.shape[dim], m),))


def _cut_list(entries: list[Any], m: int, kind: Callable[[list[Any]], Any]) -> Slices:
    # Cut where tensor_split() would, so that lists and tensors of one batch stay together.
    rows, slices, start = row_counts(len(entries), m), [], 0
    for count in rows:
        slices.append(kind(entries[start : start + count]))
        start += count
    return Slices(slices, (rows,))


def _slices_along(name: str, mark: Along, m: int) -> Slices:
    leaves, spec = tree_flatten(mark.value)
    columns = []
    for leaf in leaves:
        tensor = as_tensor(name, leaf)
        columns.append(_cut_tensor(name, tensor, m, mark.dim) if isinstance(tensor, Tensor) else Slices([leaf] * m))
    return _joined_slices(columns, spec, m)


def _slices_given(name: str, mark: MicroBatches, m: int) -> Slices:
    """What the user cut: with rows only where all entries have some, for an entry may be packed in a way only the model knows."""
    entries = _checked_entries(name, mark, m)
    counts = [count_rows(entry) for entry in entries]
    fed = [as_fed(name, entry) for entry in entries]
    return Slices(fed, () if None in counts else (tuple(count for count in counts if count is not None),))


def _checked_entries(name: str, mark: MicroBatches, m: int) -> Sequence[Any]:
    if len(mark.value) != m:
        raise ConfigError(
            f"pipeoptim.MicroBatches of {name} has {len(mark.value)} entries, must have one for each micro-batch, which is {m}"
        )
    return mark.value


def count_rows(*values: Any) -> int | None:
    """The rows of what is not split; None where its parts do not agree on one number, or none of them has any."""
    counts: set[int | None] = set()
    for value in values:
        for leaf in tree_flatten(value, is_leaf=_is_leaf)[0]:
            if isinstance(leaf, MicroBatches):
                parts = [count_rows(entry) for entry in leaf.value]
                counts.add(None if None in parts else sum(part or 0 for part in parts))
            elif isinstance(leaf, Along):
                counts |= {part.shape[leaf.dim] for part in tree_leaves(leaf.value) if isinstance(part, Tensor)}
            elif isinstance(leaf, Tensor):
                counts |= {leaf.size(0)} if leaf.dim() else set()  # not .shape, which nested tensors do not have
            elif _is_numpy(leaf):
                counts |= {*leaf.shape[:1]}
            elif isinstance(leaf, (list, tuple, deque)):
                counts.add(len(leaf))
    return counts.pop() if len(counts) == 1 else None


def _is_leaf(value: Any) -> bool:
    """Whether a container is cut by its entries instead of being structure."""
    if isinstance(value, (list, deque)):
        return not any(isinstance(leaf, MARKS) for leaf in tree_leaves(value))
    if type(value) is not tuple or not value:
        return False
    if all(isinstance(entry, dict) for entry in value):
        return not any(isinstance(leaf, MARKS) for leaf in tree_leaves(value))
    return any(entry is not None for entry in value) and all(entry is None or _is_single(entry) for entry in value)


def _is_single(entry: Any) -> bool:
    """Whether an entry of a tuple cannot be cut itself, so that only the tuple can."""
    if isinstance(entry, Tensor) or _is_numpy(entry):
        return not entry.ndim
    return not isinstance(entry, MARKS) and len(leaves := tree_leaves(entry)) == 1 and leaves[0] is entry


def _check_tuples(name: str, value: Any) -> None:
    """Refuse tuples of tensors that could be read either way: n tensors of n rows, all of one kind."""

    def check(node: Any) -> bool:
        if type(node) is tuple and len(node) > 1 and all(isinstance(entry, Tensor) and entry.dim() for entry in node):
            # Tensors that differ in kind (images and labels, say) are inputs beyond doubt.
            alike = {(entry.shape[0], entry.dim(), entry.dtype) for entry in node}
            if len(alike) == 1 and node[0].shape[0] == len(node):
                raise ConfigError(
                    f"{name} holds a tuple of {len(node)} tensors of {len(node)} rows each, which may be one tensor per row or "
                    f"{len(node)} inputs; give a list for one per row, a dict or a named tuple for inputs"
                )
        return _is_leaf(node)

    tree_leaves(value, is_leaf=check)


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")  # who has an array has imported it
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_numpy_scalar(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)
