"""Whether gradients belong to their parameters alone, so that a prediction may be written over them.

After a step its gradients are no longer needed, and their memory is as large as the prediction. But a hook may have kept one, two
parameters may share one, and gradients of replicas may be views of one large buffer. All of these raise the reference counts of the
tensor or of its memory. Three counts per gradient are collected in C loops and compared as one set, instead of a check per gradient in
Python. `FusedStep.over_gradients` states what writing over gradients saves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor, UntypedStorage


def exclusively_owned(grads: Sequence[Tensor]) -> bool:
    """Whether nothing but ``p.grad`` of one parameter, and this list, refers to each of these gradients or to its memory.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> p.sum().backward()
        >>> exclusively_owned([p.grad])
        True
        >>> kept = p.grad
        >>> exclusively_owned([p.grad])
        False
    """
    exclusive = _exclusive_counts()
    # A view that begins further on shares its memory with others by construction.
    if exclusive is None or any(map(Tensor.storage_offset, grads)):
        return False
    # Each storage object is one more user of the memory, here as in `_exclusive_counts`.
    memory = [grad.untyped_storage() for grad in grads]
    filled = [*map(UntypedStorage.nbytes, memory)] == [*map(_nbytes, grads)]  # nothing else lies in the same memory
    return filled and _counts(grads, memory) <= exclusive


_nbytes = attrgetter("nbytes")


def _counts(grads: Sequence[Tensor], memory: Sequence[UntypedStorage]) -> set[tuple[int, int, int]]:
    """References of torch to a gradient, of Python to it, and of tensors to its memory: the distinct triples."""
    users = map(torch._C._storage_Use_Count, [one._cdata for one in memory])  # type: ignore[attr-defined]
    return set(zip(map(Tensor._use_count, grads), map(sys.getrefcount, grads), users, strict=True))  # type: ignore[attr-defined]


@cache
def _exclusive_counts() -> set[tuple[int, int, int]] | None:
    """The counts of a gradient that nothing else refers to, as this version of torch counts; None where it does not count."""
    if not hasattr(Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    # Measured on a gradient of autograd's own making rather than assumed: torch's versions count differently.
    with torch.enable_grad():
        p = torch.nn.Parameter(torch.ones(1))
        p.sum().backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    return _counts([p.grad], [p.grad.untyped_storage()])
