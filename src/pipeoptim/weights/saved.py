"""What autograd saves of the weights, by place instead of by value, so that a backward can run on other weights.

While a forward runs, autograd saves weights and views of them (``weight.t()``). Under :class:`SavedWeights` a saved tensor
that lies in a storage of the weights is replaced by its *place*; when the backward asks for it, it gets the same view of the weights
chosen for this backward. Nothing keeps the forward's copy alive, and views are exact, which a swap of
pointers at backward time is not.

    forward on copy A:   save A.weight.t()  ──pack──►  (storage 3, size, stride, offset)
    backward on copy B:  B.weight.t()  ◄──unpack──  (storage 3, size, stride, offset)

Tensors that autograd computes *from* the weights and saves (the low-precision copies of autocast) are not places: they keep the values of
the forward's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeoptim.errors import PipeOptimError
from pipeoptim.weights.layout import Place, view


class SavedWeights(torch.autograd.graph.saved_tensors_hooks):
    """Hooks for the forward of one micro-batch. Set ``target`` to the weights of the backward before it runs.

    Args:
        table: storage address -> storage number, of the weights that the forward runs on.

    Attributes:
        target: one base tensor per storage of the weights that the backward shall see.
    """

    def __init__(self, table: Mapping[int, int]) -> None:
        self.target: Sequence[Tensor] | None = None

        def pack(tensor: Tensor) -> Any:
            # By storage, which any view of a weight shares with it; a plain tuple rather than an object: this runs per saved tensor.
            number = table.get(tensor.untyped_storage().data_ptr())
            if number is None:
                return tensor, tensor._version  # hooks switch off autograd's own check, so `unpack` repeats it
            return Place(number, tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

        def unpack(packed: Any) -> Tensor:
            if type(packed) is Place:
                if self.target is None:
                    raise PipeOptimError("a backward ran outside the pipeline: no weights were chosen for it")
                return view(self.target, packed)
            # An activation: kept by value, as without hooks.
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError(
                    "one of the activations needed for gradient computation has been modified by an inplace operation: "
                    f"{tuple(tensor.shape)} is at version {tensor._version}, expected version {version}"
                )
            return tensor  # type: ignore[no-any-return]

        # Closures over `table`, not methods: autograd calls them once per saved tensor.
        super().__init__(pack, unpack)
