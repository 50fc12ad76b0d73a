"""Tracks live memory: storages are noted when an operation creates them, without being kept alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, every storage that an operation returns is noted under :attr:`owner`.

    Autograd's saved tensors are seen too, since what is noted is memory, however it is held.

    Attributes:
        owner: who gets what is made now; None for nobody.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner: int | None = None
        self._found: dict[int, dict[int, tuple[StorageWeakRef, int]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.owner is not None:
            self.note(self.owner, (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    def note(self, owner: int, tensors: Iterable[Tensor]) -> None:
        """The storages of ``tensors`` belong to ``owner``."""
        found = self._found.setdefault(owner, {})
        for tensor in tensors:
            storage = tensor.untyped_storage()
            found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]

    def live(self, owner: int, besides: Iterable[Tensor] = (), least: int = 0) -> int:
        """Bytes of ``owner``'s storages that are alive, of ``least`` bytes or more, but for those of the tensors ``besides``."""
        found = self._found.setdefault(owner, {})
        gone = [address for address, (at, _) in found.items() if at.expired()]  # type: ignore[no-untyped-call]
        for address in gone:
            del found[address]
        apart = {tensor.untyped_storage()._cdata for tensor in besides}
        return sum(nbytes for address, (_, nbytes) in found.items() if address not in apart and nbytes >= least)


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _page()
    except OSError:
        return 0


def _page() -> int:
    import resource

    return resource.getpagesize()


def tensors_alive() -> int:
    """Tensors that Python knows of."""
    import gc

    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
