"""Whether gradients belong to their parameters alone, so that a prediction may be written over them.

After a step nobody needs its gradients any more, and their memory is as large as the prediction. But a hook may have kept one, two
parameters may share one, and gradients of replicas may be views of one large buffer. All of them show in how often a tensor and its
memory are referred to.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def alone(grads: Sequence[Tensor]) -> bool:
    """Whether nothing but ``p.grad`` of one parameter, and this list, refers to each of these gradients or to its memory.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.sum().backward()
        >>> alone([p.grad])
        True
        >>> kept = p.grad
        >>> alone([p.grad])
        False
    """
    usual = _usual()
    return usual is not None and _counts(grads) <= usual and all(map(_fills, grads))


def _fills(grad: Tensor) -> bool:
    """Whether there is nothing else in its memory."""
    return grad.storage_offset() == 0 and grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()


def _counts(grads: Sequence[Tensor]) -> set[tuple[int, int, int]]:
    """How often torch refers to a gradient, Python to it, and tensors to its memory: the different answers."""
    memory = [grad.untyped_storage()._cdata for grad in grads]
    users = map(torch._C._storage_Use_Count, memory)  # type: ignore[attr-defined]
    return set(zip(map(Tensor._use_count, grads), map(sys.getrefcount, grads), users, strict=True))  # type: ignore[attr-defined]


@cache
def _usual() -> set[tuple[int, int, int]] | None:
    """The counts of a gradient that nobody else has, as this version of torch counts; None where it does not."""
    if not hasattr(Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    with torch.enable_grad():
        p = torch.nn.Parameter(torch.ones(1))
        p.sum().backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    return _counts([p.grad])
