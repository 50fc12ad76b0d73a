"""What the processes of a pipeline share outside themselves: a part of the store, and process groups that can be given back.

``torch.distributed.new_group`` names a group by how many groups the calling process has. Processes that have made different numbers
of groups so wait for one another until the time-out, and a name may come back after its group was destroyed, while the store still
holds the old addresses. Here names count what was made by the same processes together, which all of them know alike.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from pipeoptim.errors import StageFailure

_ABORTED = "!"
_made: Counter[str] = Counter()  # meetings held in this process, by who met


class Rendezvous:
    """Of the processes with global ranks ``ranks``, for one pipeline. All of them make theirs, in the same order.

    Args:
        role: what they are to one another; keeps pipelines and replicas apart.
        ranks: theirs, this process's included.
        timeout: seconds to wait for them.
        name: how messages call the n-th of them.
    """

    def __init__(self, role: str, ranks: Sequence[int], timeout: float, name: str = "stage {}") -> None:
        self.ranks, self.timeout, self.name = list(ranks), timedelta(seconds=timeout), name
        self.index = self.ranks.index(dist.get_rank())
        self._key = f"pipeoptim/{role}/{'_'.join(map(str, self.ranks))}"
        self._number = _made[self._key]
        self.store: Store = PrefixStore(f"{self._key}/{self._number}", c10d._get_default_store())
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._count = 0
        self._exchanged = False

    def exchange_settings(self, text: str) -> list[str]:
        """The ``text`` of every process, in their order. Once, before anything else that waits for them.

        Raises:
            StageFailure: one did not come within the time-out, or called :meth:`abort`.
        """
        found = self.all_gather("settings", text, "to be set up")
        self._note_exchanged()
        for j, theirs in enumerate(found):
            if theirs.startswith(_ABORTED):
                raise StageFailure(f"{self.name.format(j)} could not be set up: {theirs.removeprefix(_ABORTED)}")
        return found

    def all_gather(self, what: str, text: str, purpose: str) -> list[str]:
        """Put ``text`` where all find it and wait until all have done so: theirs, in their order. Once for each ``what``.

        Raises:
            StageFailure: one did not come within the time-out.
        """
        keys = [f"{what}/{j}" for j in range(len(self.ranks))]
        self.store.set(keys[self.index], text)
        try:
            self.store.wait(keys, self.timeout)
        except RuntimeError as error:
            raise StageFailure(
                f"{self._missing(keys)} did not come within {self.timeout.total_seconds():g} s {purpose}"
            ) from error
        return [self.store.get(key).decode() for key in keys]

    def _missing(self, keys: list[str]) -> str:
        try:
            return ", ".join(self.name.format(j) for j, key in enumerate(keys) if not self.store.check([key]))
        except RuntimeError:
            return "the process that holds the store is gone, and others"

    def abort(self, error: BaseException) -> None:
        """Tell the others that this process will not come, unless it has come already."""
        if not self._exchanged:
            with suppress(RuntimeError):
                self.store.set(f"settings/{self.index}", f"{_ABORTED}{(str(error).splitlines() or [type(error).__name__])[0]}")
            self._note_exchanged()

    def _note_exchanged(self) -> None:
        self._exchanged = True
        _made[self._key] = self._number + 1

    def clone_store(self) -> Store:
        """The store through a connection of its own, for who must not wait behind others."""
        clone: Callable[[], Store] | None = getattr(self.store, "clone", None)
        return self.store if clone is None else clone()

    def group(self, name: str, backend: str | None = None) -> dist.ProcessGroup:
        """The group of that name, made when all have asked for it the first time (and again after :meth:`close`).

        Raises:
            StageFailure: one did not come within the time-out.
        """
        if name not in self._groups:
            full = f"{self._count}-{name}"
            self._groups[name] = new_group(self.ranks, f"{self._key}/{self._number}/{full}", self.timeout, backend)
            self._count += 1
            self.all_gather(
                f"made/{full}", "", "to be connected"
            )  # who has it may close it at once, before others are connected
        return self._groups[name]

    def close(self, wait: bool = True) -> None:
        """Destroy the groups. Where they are used no more, their threads and connections end.

        Args:
            wait: until they have ended. A group whose processes do not finish what they began together takes until its time-out.
        """
        for group in self._groups.values():
            destroy(group)
        group = None  # type: ignore[assignment]  # the last to hold one waits for its end
        groups, self._groups = self._groups, {}
        if wait:
            groups.clear()
        else:
            threading.Thread(target=groups.clear, name="pipeoptim-close", daemon=True).start()


def new_group(ranks: list[int], name: str, timeout: timedelta, backend: str | None) -> dist.ProcessGroup:
    """As ``torch.distributed.new_group(use_local_synchronization=True)``, under a name that the caller knows to be new."""
    default = c10d._get_default_group()
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        c10d.Backend(backend or c10d._world.pg_map[default][0]),
        c10d._get_default_store(),
        name,  # type: ignore[arg-type]
        timeout=timeout,
        device_id=default.bound_device_id,
    )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group  # type: ignore[no-any-return]


def uses_gloo(device: str = "cpu") -> bool:
    """Whether tensors on devices of this type go through gloo, and not through something that may be slower or farther on purpose.

    Gloo's point-to-point messages are in the host's memory, so it may have to carry those of any device that has no backend.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return backends.get(device, backends.get("cpu")) == dist.Backend.GLOO


def destroy(group: dist.ProcessGroup) -> None:
    """As ``torch.distributed.destroy_process_group``; nothing where that was done already, with all groups together."""
    with suppress(ValueError, AssertionError, KeyError):
        dist.destroy_process_group(group)
