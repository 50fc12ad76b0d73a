"""Connecting the stages of this process with their neighbours in other processes, and letting go of them again.

All that a process holds of others is made here, under the name of one rendezvous, so that it can be given up and made anew::

    rendezvous            the place in the store where the processes of a pipeline find each other
      |- heartbeat        says that this process lives, and watches the others
      |- Unix sockets     between neighbours on one machine
      |- groups           where any neighbours have no sockets; one per direction and round of stages: activations never wait for gradients,
      |                   nor gradients for activations
      |- links            number, describe and check the messages that go through either
      '- norms            what all stages tell each other once per update, where clipping asks for it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.norm_exchange import GatheredNorms, ProcessNorms
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.engine.processes.shared_memory import shared_memory_norms
from pipeoptim.engine.transport.backend import backend_of, uses_gloo
from pipeoptim.engine.transport.link import NEVER, LinkObserver, Receiver, Sender, Waiting, pair
from pipeoptim.engine.transport.local_link import LocalReceiver, LocalSender
from pipeoptim.engine.transport.ports import Incoming, Outgoing, Ports
from pipeoptim.engine.transport.staged_link import SideStreams, StagedReceiver, StagedSender, side_streams
from pipeoptim.engine.transport.unix_channel import UnixChannels, connect_neighbours
from pipeoptim.errors import StageFailure

ACTIVATIONS, GRADIENTS = 0, 1
_DIRECTIONS = "activations", "gradients"

LOCAL_LINKS: dict[str | None, tuple[Callable[..., Sender], Callable[..., Receiver]]] = {
    dist.Backend.GLOO: (LocalSender, LocalReceiver)
}
"""The links between processes of one machine that take the place of a backend, by its name; any other backend carries messages itself."""


@dataclass(frozen=True)
class Endpoint:
    """What connecting must know of one stage of this process.

    Attributes:
        device: where the stage computes.
        observer: watches its links for a trace; None where there is none.
    """

    device: torch.device
    observer: LinkObserver | None = None


class Interruptible(Protocol):
    """What the main thread may be waiting on when a heartbeat finds that there is nothing to wait for."""

    def interrupt(self) -> None:
        """End a wait of this process, from another thread, and all later ones."""
        ...


class Connections:
    """Everything that this process holds of the others, until :meth:`close`. Made by :func:`connect`.

    Attributes:
        ports: of each stage of this process.
        interrupted_by: the failure for which :meth:`interrupt` was called; None if it was not.
    """

    def __init__(self, rendezvous: Rendezvous, norms: ProcessNorms | None, others: Sequence[Interruptible] = ()) -> None:
        self.rendezvous, self.norms, self.others = rendezvous, norms, others
        self.interrupted_by: str | None = None
        self._elsewhere: Interruptible | None = None
        self.heartbeat: Heartbeat | None = None
        self.ports: dict[int, Ports] = {}
        self.senders: list[Sender] = []
        self.receivers: list[Receiver] = []
        self._ends: dict[tuple[int, int], tuple[Sender, Receiver]] = {}  # of stage k to stage j, by (k, j)

    def seconds_late(self, k: int, peer: int) -> float:
        """The shortest time that a message from ``peer`` to stage ``k`` took, by the clocks of both; 0 where they are no neighbours."""
        return self._ends[k, peer][1].least_late / 1e9 if (k, peer) in self._ends else 0.0

    def lately_late(self, k: int, peer: int) -> float:
        """The same of the last messages; 0 also where none has come."""
        late = self._ends[k, peer][1].lately_late if (k, peer) in self._ends else NEVER
        return 0.0 if late == NEVER else late / 1e9

    def use_windows(self, windows: Sequence[int]) -> None:
        """Post as many receives ahead as ``windows`` says of each boundary; nothing is on its way. Both ends of a link call this."""
        for (k, peer), (sender, receiver) in self._ends.items():
            if receiver.ahead and receiver.channel is None:
                sender.window = receiver.window = max(receiver.window, windows[min(k, peer)])
                receiver.post_receive()

    def add(self, k: int, peer: int, sender: Sender, receiver: Receiver) -> None:
        """A pair of links of stage ``k``."""
        self.senders.append(sender)
        self.receivers.append(receiver)
        self._ends[k, peer] = sender, receiver

    def hand_over(self) -> None:
        """Nothing that was sent waits for its device any more: the program may end without :meth:`close`."""
        for sender in self.senders:
            sender.hand_over()

    def cause(self, error: str) -> str:
        """``error`` as this process saw it, with the failure that any process saw first."""
        place = self.rendezvous.name.format(self.rendezvous.index)
        seen = self.interrupted_by or f"{error} [seen by {place}]"  # after an interrupt, error only says that it was one
        return error if self.heartbeat is None else self.heartbeat.cause(seen)

    def interrupt(self, failure: str) -> None:
        """End all waits of this process for others, because of ``failure``; called from a heartbeat's thread."""
        self.interrupted_by = failure
        # All of them, since this thread cannot know which one the main thread waits on.
        waits = (self.rendezvous, self.norms, *self.others, *self.receivers, *self.senders, self._elsewhere)
        for one in waits:
            if one is not None:
                one.interrupt()

    @contextmanager
    def waiting_at(self, place: Interruptible | None) -> Iterator[None]:
        """In the block this process may wait at ``place`` as well.

        Raises:
            StageFailure: its waits have been ended already.
        """
        self._elsewhere = place  # before the look: an interrupt that comes in between finds it
        try:
            if self.interrupted_by is not None:
                raise StageFailure(self.interrupted_by)
            yield
        finally:
            self._elsewhere = None

    def close(self, wait: bool) -> None:
        """Give everything back; ``wait`` until the groups have ended, which they do at once only where nothing is in flight."""
        self.ports.clear()
        for link in (*self.receivers, *self.senders):
            link.close()
        self.receivers, self.senders, self._ends = [], [], {}
        if self.norms is not None:
            self.norms.close()
        if self.heartbeat is not None:
            self.heartbeat.close()
            self.heartbeat = None
        self.rendezvous.close(wait)


def connect(
    rendezvous: Rendezvous,
    ranks: tuple[int, ...],
    endpoints: Mapping[int, Endpoint],
    norms: ProcessNorms | None,
    transport: str,
    liveness_timeout: float | None,
    others: Sequence[Interruptible] = (),
    windows: Sequence[int] = (),
    checksums: bool = True,
) -> Connections:
    """Connect the stages ``endpoints`` of this process. All processes of ``rendezvous`` call this, with the same settings.

    Args:
        rendezvous: of this pipeline's processes; the connections close it.
        ranks: global rank of the process of each stage.
        endpoints: by stage.
        norms: exchanges the norms of gradients; None where no stage clips by them.
        transport, liveness_timeout: as in :class:`~pipeoptim.Schedule`.
        others: what else the stages may wait on; interrupted with the connections.
        checksums: whether messages carry one that leave the machine.
        windows: of each boundary between stages, the messages that may come before they are wanted; by default one.

    Raises:
        StageFailure: a process did not come within the time-out.
    """
    connections = Connections(rendezvous, norms, others)
    try:
        processes = len(rendezvous.ranks)
        note_wait = _nobody_watches
        if liveness_timeout is not None and processes > 1:
            # Before the groups: connecting is a wait for others, too, and one of them may die in it.
            connections.heartbeat = rendezvous.heartbeat(liveness_timeout, connections.interrupt)
            note_wait = connections.heartbeat.note_wait

        def waiting(peer: int | None) -> None:
            """Links wait for stages, the heartbeat watches processes."""
            note_wait(None if peer is None else peer % processes)

        carriers = {k: _carriers_of(rendezvous, k, len(ranks), one.device, transport, windows) for k, one in endpoints.items()}
        if _any_needs_groups(rendezvous, carriers, len(ranks)):
            for round_ in range(len(ranks) // processes):
                for direction in (ACTIVATIONS, GRADIENTS):
                    # All processes make all groups in the same order, even those that they do not use.
                    _group(rendezvous, direction, round_ * processes)
        for k, endpoint in endpoints.items():
            _connect_stage(connections, k, ranks, endpoint, carriers[k], waiting, windows, checksums)
        if norms is not None:
            shared = shared_memory_norms(rendezvous, transport == "auto" and uses_gloo(), waiting, norms.in_flight)
            norms.connect(shared or GatheredNorms(rendezvous.group("norms", "gloo"), rendezvous.timeout))
        if connections.interrupted_by is not None:  # perhaps before there was all that it had to cut
            raise StageFailure(connections.interrupted_by)
    except BaseException:
        connections.close(wait=False)
        raise
    return connections


def _nobody_watches(peer: int | None) -> None:
    """What a link reports its waits to where there is no heartbeat."""


def _group(rendezvous: Rendezvous, direction: int, boundary: int) -> dist.ProcessGroup:
    """What messages in ``direction`` between stages ``boundary`` and ``boundary + 1`` go through.

    With several stages per process the boundaries between the same two processes have groups of their own, one per round.
    """
    return rendezvous.group(f"{_DIRECTIONS[direction]} {boundary // len(rendezvous.ranks)}")


class _Carriers(NamedTuple):
    """What can carry the messages of a stage.

    Attributes:
        streams: copy them between its device and the host's memory; None where they need no copy.
        in_host: whether what travels is in the host's memory.
        channels: to neighbours on this machine.
    """

    streams: SideStreams | None
    in_host: bool
    channels: UnixChannels


def _carriers_of(
    rendezvous: Rendezvous, k: int, depth: int, device: torch.device, transport: str, windows: Sequence[int]
) -> _Carriers:
    # Only where a device's messages must pass through the host; a backend of the device's own needs none.
    streams = side_streams(device)
    in_host = device.type == "cpu" or streams is not None
    wanted = transport == "auto" and in_host and backend_of() in LOCAL_LINKS
    channels = connect_neighbours(rendezvous.store, k, depth, wanted, rendezvous.timeout, windows)
    return _Carriers(streams, in_host, channels)


def _any_needs_groups(rendezvous: Rendezvous, carriers: Mapping[int, _Carriers], depth: int) -> bool:
    """Whether neighbours in any of the processes have no channels; the same everywhere.

    A group of gloo that nobody uses is not free: its thread wakes up 100 times a second, on the core where the stage computes.
    """
    lacking = any(
        (ACTIVATIONS, boundary) not in one.channels
        for k, one in carriers.items()
        for boundary in (k - 1, k)
        if 0 <= boundary < depth - 1
    )
    return "group" in rendezvous.all_gather("carriers", "group" if lacking else "channels", "to be connected")


def _connect_stage(
    connections: Connections,
    k: int,
    ranks: tuple[int, ...],
    endpoint: Endpoint,
    carriers: _Carriers,
    waiting: Waiting,
    windows: Sequence[int],
    checksums: bool,
) -> None:
    """Make the links of stage ``k`` to the stages before and after it."""
    rendezvous, device, observer = connections.rendezvous, endpoint.device, endpoint.observer
    streams, in_host, channels = carriers
    waiting = waiting if observer is None else observer.waiting(waiting)

    def ends(there: int, back: int, boundary: int, peer: int) -> tuple[Incoming, Outgoing]:
        """From and to ``peer``; the first two say in which direction messages go."""
        sender: Callable[..., Sender] = Sender
        receiver: Callable[..., Receiver] = Receiver
        if streams is not None:
            sender, receiver = partial(StagedSender, streams), partial(StagedReceiver, streams)
        elif (ACTIVATIONS, boundary) in channels:
            sender, receiver = LOCAL_LINKS[backend_of()]
        rest = peer, ranks[peer], device, rendezvous.timeout.total_seconds(), waiting
        out, into = (channels.get((way, boundary)) or _group(rendezvous, way, boundary) for way in (there, back))
        # Not ahead in a device's own memory: a receive that is never matched would keep its stream busy.
        sends, receives = sender(out, *rest), receiver(into, *rest, ahead=in_host)
        if windows and in_host and (ACTIVATIONS, boundary) not in channels:  # in a channel messages wait by themselves
            sends.window = receives.window = windows[boundary]
        # Not in a device's own memory, which the host would have to read; nor where the kernel copies within one machine.
        sends.checksums = checksums and in_host and (ACTIVATIONS, boundary) not in channels
        receives.name = f"{_DIRECTIONS[back]} from stage {peer} to stage {k}"
        # Activations acknowledge gradients and the other way round, without a message of their own.
        pair(sends, receives)
        # The links themselves and not their traced forms: closing and interrupting is no business of a trace.
        connections.add(k, peer, sends, receives)
        return (receives, sends) if observer is None else (observer.incoming(receives), observer.outgoing(sends))

    previous = ends(GRADIENTS, ACTIVATIONS, k - 1, k - 1) if k > 0 else (None, None)
    following = ends(ACTIVATIONS, GRADIENTS, k, k + 1) if k < len(ranks) - 1 else (None, None)
    connections.ports[k] = Ports(*previous, *following)
