"""What the processes of a run do collectively; a run in one process has a trivial version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from pipeoptim.train.measurements import KeptMeasurements, LocalMeasurements, StageMeasurements, StoreMeasurements

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

    from pipeoptim.engine.processes.rendezvous import Rendezvous
    from pipeoptim.train.layout import Layout


class RunGroup(Protocol):
    """Processes of one run. Each holds one or more stages."""

    @property
    def is_first(self) -> bool:
        """Whether this process does what must be done exactly once."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...

    @property
    def index(self) -> int:
        """Which of them this one is."""
        ...

    @property
    def store(self) -> Store:
        """Through which threads tell each other what no collective may, since those of training are on their way."""
        ...

    @property
    def reporter(self) -> int:
        """The rank that reports the figures: that of the last stage in the first replica."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, on every process; plain data and tensors."""
        ...

    def once(self, work: Callable[[], Any]) -> list[Any]:
        """What ``work`` returns in every process, on every process. A process that takes the place of one that has done it does not do
        it again."""
        ...

    def mean_loss(self, loss: Tensor) -> Tensor:
        """Of the losses of all replicas; called where the last stage is."""
        ...

    def measurements(self, kind: str) -> StageMeasurements:
        """The channel that brings measurements of one ``kind`` to the process of the last stage."""
        ...


class SingleProcessGroup:
    """The group of an emulated run."""

    is_first = True
    index = reporter = 0

    @cached_property
    def store(self) -> Store:
        """Of this process."""
        from torch._C._distributed_c10d import HashStore

        return HashStore()

    def barrier(self) -> None:
        """There is no other process."""

    def gather(self, value: Any) -> list[Any]:
        """Only its own."""
        return [value]

    def once(self, work: Callable[[], Any]) -> list[Any]:
        """Done here."""
        return [work()]

    def mean_loss(self, loss: Tensor) -> Tensor:
        """There is one replica."""
        return loss

    def measurements(self, kind: str) -> StageMeasurements:
        """They are in this process already."""
        return LocalMeasurements()


class DistributedGroup:
    """The default process group of ``torch.distributed``.

    Args:
        layout: which rank holds which stages.
        meeting: what a collective runs in, which says of one that fails which process failed first.
        replicas: the processes that hold the same stages as this one, if there are others.
    """

    def __init__(
        self,
        layout: Layout,
        meeting: Callable[[], AbstractContextManager[object]],
        replicas: dist.ProcessGroup | None = None,
    ) -> None:
        self.layout, self.replicas, self._meeting = layout, replicas, meeting
        self.reporter = layout.reporter

    @property
    def index(self) -> int:
        """The rank."""
        import torch.distributed as dist

        return dist.get_rank()

    @property
    def store(self) -> Store:
        """That of the group, under a prefix."""
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        return PrefixStore("pipeoptim/saving", _get_default_store())

    @property
    def is_first(self) -> bool:
        """Whether this is the process of stage 0."""
        return self.index == 0

    def barrier(self) -> None:
        """Wait for all."""
        import torch.distributed as dist

        with self._meeting():
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Tensors and plain data only; nothing is pickled."""
        from pipeoptim.engine.processes.collectives import all_gather_plain

        with self._meeting():
            return all_gather_plain(value)

    def once(self, work: Callable[[], Any]) -> list[Any]:
        """These processes are not replaced."""
        return self.gather(work())

    def measurements(self, kind: str) -> StageMeasurements:
        """Through the store of the process group; those of the first replica."""
        import torch.distributed as dist

        return StoreMeasurements(dist.get_rank(), self.layout.width, kind)

    def mean_loss(self, loss: Tensor) -> Tensor:
        """By an all-reduce among the processes of the last stage."""
        import torch.distributed as dist

        if self.replicas is None:
            return loss
        # A copy: all_reduce works in place, and the loss belongs to the pipeline.
        total = loss.detach().clone()
        with self._meeting():
            dist.all_reduce(total, group=self.replicas)
        return total / self.layout.replicas


class ReplaceableGroup(DistributedGroup):
    """Processes that may be replaced: what each has said stays in the store, where one that does its predecessor's work again finds it.

    Args:
        rendezvous: of the pipeline, which looks after its neighbours while it waits.
    """

    def __init__(self, layout: Layout, rendezvous: Rendezvous) -> None:
        super().__init__(layout, nullcontext)  # it waits in no collective
        self._rendezvous = rendezvous
        self._count = 0

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        """Tensors and plain data only; nothing is pickled."""
        return self.once(lambda: value)

    def once(self, work: Callable[[], Any]) -> list[Any]:
        """Whoever finds its own answer in the store has done the work in an earlier life."""
        from pipeoptim.engine.processes.collectives import pack, unpack

        store, what = self._rendezvous.store, f"group/{self._count}"
        self._count += 1
        keys = [f"{what}/{rank}" for rank in range(len(self._rendezvous.ranks))]
        own = keys[self._rendezvous.index]
        if not store.check([own]):
            store.set(own, bytes(pack(work()).numpy()).hex())
        self._rendezvous.wait_for(keys, f"at meeting {self._count} of the run")
        return [unpack(torch_bytes(bytes.fromhex(store.get(key).decode()))) for key in keys]

    def measurements(self, kind: str) -> StageMeasurements:
        """They stay in the store as well."""
        return KeptMeasurements(self._rendezvous, self.layout.width, kind)


def torch_bytes(data: bytes) -> Tensor:
    """A block for ``unpack``."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
