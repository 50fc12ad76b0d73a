"""What the processes of a pipeline do together when they save: a group of their own, so that nothing meets training's messages."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch.distributed as dist

    from pipeoptim.engine.base import Pipeline


class Together:
    """The processes of one pipeline; one process for an emulated one.

    Args:
        ranks: global rank of the process of each stage, None where all stages live here.
    """

    def __init__(self, ranks: tuple[int, ...] | None) -> None:
        self.ranks = None if ranks is None else list(dict.fromkeys(ranks))

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """On the CPU, whatever the pipeline computes on; made by all its processes when they first need it."""
        import torch.distributed as dist

        if self.ranks is None:
            return None
        made: dist.ProcessGroup = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        return made

    @property
    def is_first(self) -> bool:
        """Whether this is the process of stage 0."""
        import torch.distributed as dist

        return self.ranks is None or dist.get_rank() == self.ranks[0]

    def barrier(self) -> None:
        """Wait for all."""
        import torch.distributed as dist

        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, on every process. Pickled: small, plain data of one's own processes."""
        import torch.distributed as dist

        if self.group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_at_first(self, value: Any) -> list[Any] | None:
        """The ``value`` of every process on the first; None on the others."""
        import torch.distributed as dist

        if self.group is None or self.ranks is None:
            return [value]
        values: list[Any] | None = [None] * dist.get_world_size(self.group) if self.is_first else None
        dist.gather_object(value, values, dst=self.ranks[0], group=self.group)
        return values


_known: WeakKeyDictionary[Any, Together] = WeakKeyDictionary()


def together(pipe: Pipeline) -> Together:
    """The processes of ``pipe``, with one group for all that it ever saves."""
    if pipe not in _known:
        _known[pipe] = Together(pipe.ranks)
    return _known[pipe]
