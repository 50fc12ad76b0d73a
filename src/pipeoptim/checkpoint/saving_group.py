"""Collectives of the processes of a pipeline while they save, in a process group of their own: training's messages may be in flight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import Store

    from pipeoptim.engine.pipeline import Pipeline


T = TypeVar("T")


class SavingGroup:
    """The processes of one pipeline; one process for an emulated one.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.rendezvous, self._meeting = pipe.rendezvous, pipe.meeting

    @property
    def group(self) -> dist.ProcessGroup | None:
        """On the CPU, whatever the pipeline computes on; made by all its processes when they first need it."""
        return None if self.rendezvous is None else self.rendezvous.group("saving", "gloo")

    @property
    def index(self) -> int:
        """Which of them this process is."""
        return 0 if self.rendezvous is None else self.rendezvous.index

    @property
    def is_first(self) -> bool:
        """Whether this is the process of stage 0."""
        return self.index == 0

    @cached_property
    def store(self) -> Store:
        """Through which threads tell each other what no collective may, since those of training are on their way."""
        from torch._C._distributed_c10d import HashStore
        from torch.distributed.distributed_c10d import PrefixStore

        return HashStore() if self.rendezvous is None else PrefixStore("saving", self.rendezvous.store)

    def refuse_kept_store(self) -> None:
        """Raises ConfigError where these processes could not meet again after torchrun has restarted them."""
        from pipeoptim.engine.processes.fresh_store import refuse_kept_store

        if self.rendezvous is not None:
            refuse_kept_store()

    def barrier(self) -> None:
        """Wait for all."""
        import torch.distributed as dist

        with self._meeting():
            if self.group is not None:
                dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, on every process: tensors and plain data."""
        from pipeoptim.engine.processes.collectives import all_gather_plain

        with self._meeting():
            return [value] if self.group is None else all_gather_plain(value, self.group)

    def gather_at_first(self, value: Any) -> list[Any] | None:
        """The ``value`` of every process on the first; None on the others."""
        from pipeoptim.engine.processes.collectives import gather_plain

        with self._meeting():
            if self.group is None or self.rendezvous is None:
                return [value]
            return gather_plain(value, self.rendezvous.ranks[0], self.group)

    def agreed(self, make: Callable[[], T]) -> T:
        """What ``make`` returns; where it is refused in one process all of them raise, since the others would wait for that one."""
        made, refusal = None, None
        try:
            made = make()
        except ConfigError as error:
            refusal = error
        for reason in filter(None, self.gather(None if refusal is None else str(refusal))):
            raise ConfigError(reason) from refusal
        return made  # type: ignore[return-value]


def checked(pipe: object, what: str, names: object = None) -> None:
    """Raises ConfigError where ``what`` was given something else than a pipeline, or than names for each of its stages.

    Called before anything else, since the drain that comes next moves weights.
    """
    from pipeoptim.engine.pipeline import Pipeline

    if not isinstance(pipe, Pipeline):
        raise ConfigError(
            f"{what}() was given a {type(pipe).__name__}, must be given the pipeline: an Emulator, Schedule or InterleavedSchedule"
        )
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(own, Mapping) for own in names)):
        raise ConfigError(
            f"names is {names!r}, must be a list of one dictionary per stage, name in the original model -> name in the stage: the names "
            "of a partition"
        )


def refuse_sharded(pipe: Pipeline, processes: SavingGroup) -> None:
    """Raises ConfigError, in all processes, where a stage is spread over processes that are not of this pipeline."""
    sharded = [
        k for part in processes.gather([k for k in pipe.local_stages if pipe.stage_worker(k).reduction.shards]) for k in part
    ]
    if sharded:
        raise ConfigError(
            f"stage {sharded[0]} is sharded over its replicas, so no pipeline has all of it to write; save full_state_dict(pipe), which "
            "all replicas call, and to go on later the stage_state_dict(k) of every process"
        )


def saving_group(pipe: Pipeline) -> SavingGroup:
    """The processes of ``pipe``."""
    return SavingGroup(pipe)
