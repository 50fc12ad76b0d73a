"""Put other weights into a module for the time of a ``with`` block, and always take them out again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class swapped:  # noqa: N801  # used like a function; as a generator it took three times as long
    """Let ``params`` hold the values of ``tensors`` inside the block, without a copy.

    Only the pointer to the data changes: the parameters stay the same objects, so gradients arrive where the optimizer
    looks for them. The old pointers come back also when the block raises.

    Args:
        params: parameters of a module.
        tensors: same shapes, strides, types and devices; None leaves the parameters as they are.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(2))
        >>> with swapped([p], [torch.ones(2)]):
        ...     print(p.sum().item())
        2.0
        >>> p.sum().item()
        0.0
    """

    # Made once per forward and backward.
    __slots__ = ("_originals", "_params", "_tensors")

    def __init__(self, params: Sequence[Tensor], tensors: Sequence[Tensor] | None) -> None:
        self._params, self._tensors = params, tensors
        self._originals: list[Tensor] = []

    def __enter__(self) -> None:
        if self._tensors is None:
            return
        # Through .data, so that autograd neither records the change nor counts it as a new version of the parameter.
        self._originals = [p.data for p in self._params]
        try:
            for p, tensor in zip(self._params, self._tensors, strict=True):
                p.data = tensor
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        originals, self._originals = self._originals, []
        for p, original in zip(self._params, originals, strict=False):  # none where nothing was put in
            p.data = original
