"""Copies of a stage's weights that have the same layout in memory as the weights themselves.

A copy is made per *storage*, not per parameter. Parameters that share one storage (views of a flat buffer, the weights of
an ``nn.LSTM`` on a GPU) share one in the copy too, and any view of a weight that autograd keeps, such as ``weight.t()``, is
found in every copy at the same offset and strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeoptim.kernels.allocation import empty_like


class Place(NamedTuple):
    """Where a tensor lies: which storage of the stage, and the geometry inside it."""

    storage: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class BufferSet:
    """One full copy of the weights of a stage.

    Attributes:
        tensors: a view for each parameter, in the order given to :class:`StorageLayout`.
        bases: one tensor per storage.
        table: storage address -> storage number.
        adopted: it lies in memory that was allocated for something else (gradients); it is freed after use, never reused.
    """

    __slots__ = ("adopted", "bases", "table", "tensors")

    def __init__(self, bases: Sequence[Tensor], places: Sequence[Place] | None) -> None:
        self.bases = list(bases)
        # What SavedWeights looks up per saved tensor, so it is built once per copy.
        self.table = {base.untyped_storage().data_ptr(): n for n, base in enumerate(self.bases)}
        self.tensors = self.bases if places is None else [view(self.bases, place) for place in places]
        self.adopted = places is None

    def nbytes(self) -> int:
        """Bytes of memory this copy occupies."""
        return sum(base.untyped_storage().nbytes() for base in self.bases)


class StorageLayout:
    """The storages that hold ``params`` and the place of each parameter in them."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        numbers: dict[int, int] = {}
        bases: list[Tensor] = []
        self.places: list[Place] = []
        for p in params:
            storage = p.untyped_storage()
            key = storage.data_ptr() or -id(p)  # all empty storages have address 0
            if key not in numbers:
                numbers[key] = len(bases)
                bases.append(_whole_storage(p))
            self.places.append(Place(numbers[key], p.size(), p.stride(), int(p.storage_offset()), p.dtype))
        self.latest = BufferSet(bases, self.places)

    def copy(self) -> BufferSet:
        """A new copy, equal to the latest weights, including the parts of a storage that no parameter covers."""
        return BufferSet([empty_like(base).copy_(base) for base in self.latest.bases], self.places)

    @property
    def one_storage_each(self) -> bool:
        """Whether every parameter fills a storage of its own, so that any tensor of the same layout can hold a copy of it."""
        # Equal numbers: no two parameters share a storage.
        return len(self.places) == len(self.latest.bases) and all(
            place.offset == 0 and place.size.numel() == base.numel()
            for place, base in zip(self.places, self.latest.bases, strict=True)
        )

    def adopt(self, tensors: Sequence[Tensor]) -> BufferSet:
        """Foreign tensors with the layout of the parameters, as a copy; only where :attr:`one_storage_each`."""
        # No places: each gradient is the base of its parameter, with the parameter's own strides.
        return BufferSet(tensors, None)


def view(bases: Sequence[Tensor], place: Place) -> Tensor:
    """The tensor at ``place`` in the storages that ``bases`` stand for."""
    base = bases[place.storage]
    if base.dtype is place.dtype:  # as_strided counts in elements of the base's type
        return base.as_strided(place.size, place.stride, place.offset)
    # Parameters of two types in one storage (a flat buffer reinterpreted): set_() counts in elements of the place's own type.
    other = torch.empty(0, dtype=place.dtype, device=base.device)
    return other.set_(base.untyped_storage(), place.offset, place.size, place.stride)  # type: ignore[no-any-return,call-overload]


def _whole_storage(p: Tensor) -> Tensor:
    """The storage of ``p`` from end to end, as one detached flat tensor of its type."""
    storage = p.untyped_storage()
    # set_() rather than view(): it reaches parts of the storage before and behind the parameter.
    flat = torch.empty(0, dtype=p.dtype, device=p.device)
    return flat.set_(storage, 0, (storage.nbytes() // p.element_size(),), (1,))  # type: ignore[no-any-return,call-overload]
