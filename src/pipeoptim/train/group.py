"""The few things that the processes of a run do together, with a version for a run that is one process."""

from __future__ import annotations

from typing import Any, Protocol

from pipeoptim.train.figures import Figures, LocalFigures, StoreFigures


class Group(Protocol):
    """Processes of one run. Each holds one or more stages."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that does what must be done once."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, in the order of the stages, on every process."""
        ...

    def figures(self) -> Figures:
        """A way for figures to come to the last stage's process."""
        ...


class OneProcess:
    """The group of an emulated run."""

    is_first = True

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """Just its own."""
        return [value]

    def figures(self) -> Figures:
        """They are there."""
        return LocalFigures()


class Distributed:
    """The default process group of ``torch.distributed``."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process of stage 0."""
        import torch.distributed as dist

        return dist.get_rank() == 0

    def barrier(self) -> None:
        """Wait for all."""
        import torch.distributed as dist

        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Objects are pickled: only for small, plain data between one's own processes."""
        import torch.distributed as dist

        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def figures(self) -> Figures:
        """Through the store of the process group."""
        import torch.distributed as dist

        return StoreFigures(dist.get_rank(), dist.get_world_size())
