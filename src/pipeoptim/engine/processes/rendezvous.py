"""Where the processes of a pipeline meet: a part of the store, and process groups that can be destroyed and made again.

``torch.distributed.new_group`` names a group by how many groups the calling process has. Processes that have made different numbers
of groups therefore wait for one another until the time-out, and a name may return after its group was destroyed, while the store still
holds the old addresses. Here names count what the same processes have made together, which all of them know. Each name also carries a
generation: processes that connect again after a failure find no key and no address that the failed attempt left behind.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.opened_sockets import OpenedSockets
from pipeoptim.errors import StageFailure, first_line

_ABORTED = "!"
_made: Counter[str] = Counter()  # rendezvous completed in this process, by who met


class Rendezvous:
    """Of the processes with global ranks ``ranks``, for one pipeline. All of them make theirs, in the same order.

    Args:
        role: what they are to one another; keeps pipelines and replicas apart.
        ranks: theirs, this process's included.
        timeout: seconds to wait for them.
        name: how messages call the n-th of them.
        generation: how often these processes have connected again for the same pipeline.
        number: which pipeline of these processes it is; counted if None. A process that joins anew must be given both.

    Attributes:
        while_waiting: called again and again while this process waits for the others here.
    """

    def __init__(
        self,
        role: str,
        ranks: Sequence[int],
        timeout: float,
        name: str = "stage {}",
        *,
        generation: int = 0,
        number: int | None = None,
    ) -> None:
        self.role, self.ranks, self.timeout, self.name = role, list(ranks), timedelta(seconds=timeout), name
        self.index = self.ranks.index(dist.get_rank())
        # By global ranks, which all members know alike; two pipelines of the same processes differ by number.
        self._members = f"pipeoptim/{role}/{'_'.join(map(str, self.ranks))}"
        self.generation, self.number = generation, _made[self._members] if number is None else number
        self._prefix = f"{self._members}/{self.number}.{generation}"
        self._sockets = OpenedSockets(port_of(c10d._get_default_store()))
        with self._sockets:  # a connection of its own, which can be cut without taking the caller's store away
            self._connection = _clone(c10d._get_default_store())
        self.store: Store = PrefixStore(self._prefix, self._connection)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._count = 0
        self._exchanged = self._interrupted = False
        self.while_waiting: Callable[[], None] = _do_nothing

    def next_generation(self) -> Rendezvous:
        """Where the same processes meet again, for the same pipeline, after this one was interrupted or closed."""
        # The same number: the count of rendezvous in this process has gone on since, perhaps not equally far in all of them.
        seconds = self.timeout.total_seconds()
        return Rendezvous(self.role, self.ranks, seconds, self.name, generation=self.generation + 1, number=self.number)

    def exchange_settings(self, text: str) -> list[str]:
        """The ``text`` of every process, in their order. Once, before anything else that waits for them.

        Raises:
            StageFailure: one did not come within the time-out, or called :meth:`abort`.
        """
        found = self.all_gather("settings", text, "to be set up")
        # Before looking for failures: whoever has met has used up this number, also where the set-up fails.
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
        try:
            self.store.set(keys[self.index], text)
            self.wait_for(keys, purpose)
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:
            if isinstance(error, StageFailure):
                raise
            reason = "the wait was interrupted" if self._interrupted else "the process that holds the store is gone"
            raise StageFailure(f"the processes did not meet {purpose}: {reason}") from error

    def wait_for(self, keys: list[str], purpose: str, store: Store | None = None) -> None:
        """Wait until all have set theirs of ``keys``, in the part of the store that is theirs, or another one.

        Raises:
            StageFailure: one did not within the time-out.
        """
        end, pause = time.monotonic() + self.timeout.total_seconds(), 0.001
        store = store or self.store
        while not store.check(keys):  # in turns, not in the store's own wait, which nothing interrupts
            if self._interrupted:
                raise StageFailure(f"the processes did not meet {purpose}: the wait was interrupted")
            if time.monotonic() > end:
                missing = [self.name.format(j) for j, key in enumerate(keys) if not store.check([key])]
                raise StageFailure(f"{', '.join(missing)} did not come within {self.timeout.total_seconds():g} s {purpose}")
            self.while_waiting()
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    @property
    def store_address(self) -> tuple[str, int]:
        """Host and port of the store."""
        store = innermost(self.store)
        return store.host, store.port  # type: ignore[attr-defined]

    def abort(self, error: BaseException) -> None:
        """Tell the others that this process will not come, unless it has come already."""
        if not self._exchanged:
            with suppress(RuntimeError):
                self.store.set(f"settings/{self.index}", f"{_ABORTED}{(str(error).splitlines() or [type(error).__name__])[0]}")
            self._note_exchanged()

    def _note_exchanged(self) -> None:
        self._exchanged = True
        _made[self._members] = self.number + 1

    def heartbeat(self, timeout: float, on_dead: Callable[[str], None]) -> Heartbeat:
        """Of this process among them, from now on; ``timeout`` and ``on_dead`` as in :class:`~.heartbeat.Heartbeat`."""
        # torchrun's agent then serves the store, in a process that outlives the workers.
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        holder = None if by_agent or 0 not in self.ranks else self.ranks.index(0)
        store = _clone(self.store)  # through another connection: its requests must not wait behind the main thread's
        return Heartbeat(store, self.index, len(self.ranks), timeout, self.name, holder, on_dead=on_dead)

    def group(self, name: str, backend: str | None = None) -> dist.ProcessGroup:
        """The group of that name, made when all have asked for it the first time (and again after :meth:`close`).

        Raises:
            StageFailure: one did not come within the time-out.
        """
        if name not in self._groups:
            # Counted, since a name may be asked for again after close(), and the store still holds its old addresses.
            full = f"{self._count}-{name}"
            try:
                with self._sockets:
                    self._groups[name] = new_group(
                        self.ranks, f"{self._prefix}/{full}", self._connection, self.timeout, backend
                    )
            except RuntimeError as error:
                first = first_line(error)
                raise StageFailure(f"the group {name!r} could not be connected ({first})") from error
            self._count += 1
            if self._interrupted:  # after its connections had been looked for
                self._sockets.shut_down()
            # The first to have the group may destroy it at once, while others are still connecting: wait for all.
            self.all_gather(f"made/{full}", "", "to be connected")
        return self._groups[name]

    def interrupt(self) -> None:
        """End a wait of this process for the others, from another thread, and all later ones: connections are cut."""
        self._interrupted = True
        self._sockets.shut_down()
        for group in list(self._groups.values()):
            with suppress(RuntimeError):  # NCCL's way to end its waits; gloo's does nothing
                group.abort()

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
            _end_later(groups, self._sockets)


def _end_later(groups: dict[str, dist.ProcessGroup], sockets: OpenedSockets) -> None:
    """Let go of ``groups`` in a thread, for their end may take until a time-out; at the latest they end with the program."""

    def end() -> None:
        groups.clear()
        atexit.unregister(end_with_program)

    def end_with_program() -> None:
        # A thread that is inside C++ when the interpreter ends aborts the process. What it waits for ends with the connections.
        sockets.shut_down()
        thread.join(timeout=5.0)

    thread = threading.Thread(target=end, name="pipeoptim-close", daemon=True)
    atexit.register(end_with_program)
    thread.start()


def _clone(store: Store) -> Store:
    clone: Callable[[], Store] | None = getattr(store, "clone", None)
    return store if clone is None else clone()


def port_of(store: Store) -> int | None:
    """Where the processes reach it; None where it listens nowhere."""
    return getattr(innermost(store), "port", None)


def innermost(store: Store) -> Store:
    """``store`` without its prefixes."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def _do_nothing() -> None:
    """What a process does while it waits, unless it has something to look after."""


def new_group(ranks: list[int], name: str, store: Store, timeout: timedelta, backend: str | None) -> dist.ProcessGroup:
    """As ``torch.distributed.new_group(use_local_synchronization=True)``, under a name that the caller knows to be new.

    Its processes find each other's addresses in ``store``.
    """
    default = c10d._get_default_group()
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        ranks,
        c10d.Backend(backend or c10d._world.pg_map[default][0]),
        store,
        name,  # type: ignore[arg-type]
        timeout=timeout,
        device_id=default.bound_device_id,
    )
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group  # type: ignore[no-any-return]


def destroy(group: dist.ProcessGroup) -> None:
    """As ``torch.distributed.destroy_process_group``; nothing where that was done already, with all groups together."""
    with suppress(ValueError, AssertionError, KeyError):
        dist.destroy_process_group(group)
