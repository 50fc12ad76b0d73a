"""Whether gradients belong to their parameters alone, so that a prediction may be written over them.

After a step nobody needs its gradients any more, and their memory is as large as the prediction. But a hook may have kept one, two
parameters may share one, and gradients of replicas may be views of one large buffer. All of them show in the reference counts of a
tensor and of its memory. The counts are compared as sets over all gradients, in C loops: three numbers per gradient instead of a
check per gradient in Python. What writing over gradients saves is told in `FusedStep.over_gradients`.
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
    if exclusive is None or any(map(Tensor.storage_offset, grads)):
        return False
    memory = [grad.untyped_storage() for grad in grads]
    filled = [*map(UntypedStorage.nbytes, memory)] == [*map(_nbytes, grads)]  # nothing else lies in the same memory
    return filled and _counts(grads, memory) <= exclusive


_nbytes = attrgetter("nbytes")


def _counts(grads: Sequence[Tensor], memory: Sequence[UntypedStorage]) -> set[tuple[int, int, int]]:
    """How often torch refers to a gradient, Python to it, and tensors to its memory: the different answers."""
    users = map(torch._C._storage_Use_Count, [one._cdata for one in memory])  # type: ignore[attr-defined]
    return set(zip(map(Tensor._use_count, grads), map(sys.getrefcount, grads), users, strict=True))  # type: ignore[attr-defined]


@cache
def _exclusive_counts() -> set[tuple[int, int, int]] | None:
    """The counts of a gradient that nobody else has, as this version of torch counts; None where it does not."""
    if not hasattr(Tensor, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    with torch.enable_grad():
        p = torch.nn.Parameter(torch.ones(1))
        p.sum().backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    return _counts([p.grad], [p.grad.untyped_storage()])
