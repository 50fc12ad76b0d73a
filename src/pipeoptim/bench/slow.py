"""A slow network between processes of one machine: messages arrive late, through gloo or through the links of one machine.

A message from one process to another arrives ``delay`` after its last byte left, and bytes leave at ``bandwidth``, one message after the
other on each link and direction. ``register()`` makes ``init_process_group("slow")`` possible, in either way::

    torch's schedules, transport="group"   SlowGroup: to torch a process group like any other. A thread per link holds messages back
                                           before gloo sends them; the sender does not wait.
    a pipeline's own links                 LateReceiver: messages pass at once and wait in shared memory, as those wait that
                                           come before they are wanted; the receiver takes none before its time, counted from the moment
                                           of sending in its header. No thread wakes up for them, and no more of them are on their way
                                           than the order of the actions allows.

Collective operations are not slowed down.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import Any

import torch.distributed as dist

from pipeoptim.bench.processes import BANDWIDTH, DELAY
from pipeoptim.engine.processes.connect import LOCAL_LINKS
from pipeoptim.engine.transport.local_link import LocalReceiver, LocalSender
from pipeoptim.engine.transport.message import Header, Message

SENT: list[int] = []
"""Bytes of every message that left this process; whoever counts clears it."""


class _DelayedSend(dist.Work):
    """A send that is held back until its message would have arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.started = threading.Event()
        self.inner: Any = None

    def is_completed(self) -> bool:
        return self.started.is_set() and bool(self.inner.is_completed())

    def wait(self, *timeout: Any) -> bool:
        self.started.wait()
        return bool(self.inner.wait(*timeout))


class _DelayedLink:
    """One direction to one peer."""

    def __init__(self, group: Any, delay: float, bandwidth: float) -> None:
        self.group, self.delay, self.bandwidth = group, delay, bandwidth
        self.free = 0.0  # when the line has taken all bytes so far
        self.waiting: queue.SimpleQueue[tuple[float, _DelayedSend, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, tensors: Any, peer: int, tag: int) -> _DelayedSend:
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        SENT.append(nbytes)
        seconds = nbytes / self.bandwidth if self.bandwidth else 0.0
        self.free = max(self.free, time.monotonic()) + seconds
        work = _DelayedSend()
        self.waiting.put((self.free + self.delay, work, (tensors, peer, tag)))
        return work

    def _run(self) -> None:
        while True:
            arrival, work, message = self.waiting.get()
            time.sleep(max(0.0, arrival - time.monotonic()))
            work.inner = self.group.send(*message)
            work.started.set()


class SlowGroup(dist.ProcessGroup):
    """gloo with late messages."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.inner: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.delay, self.bandwidth = float(os.environ[DELAY]), float(os.environ[BANDWIDTH])
        self.links: dict[int, _DelayedLink] = {}

    def send(self, tensors: Any, peer: int, tag: int = 0) -> _DelayedSend:
        if peer not in self.links:
            self.links[peer] = _DelayedLink(self.inner, self.delay, self.bandwidth)
        return self.links[peer].send(tensors, peer, tag)

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> Any:
        return self.inner.recv(tensors, peer, tag)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.barrier(*args, **kwargs)

    def allreduce(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.allreduce(*args, **kwargs)

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.broadcast(*args, **kwargs)

    def allgather(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.allgather(*args, **kwargs)

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return "slow"


class LateReceiver(LocalReceiver):
    """As :class:`~pipeoptim.engine.transport.local_link.LocalReceiver`, at the end of a slow link."""

    def __init__(self, *args: Any, ahead: bool) -> None:
        super().__init__(*args, ahead=ahead)
        self._delay, self._bandwidth = float(os.environ[DELAY]), float(os.environ[BANDWIDTH])
        self._free = 0.0  # when the line has taken all bytes so far
        self._nbytes = 0  # of the message that is being received

    def receive(self) -> Message:
        self._nbytes = self.size
        return super().receive()

    def _next_posted(self) -> tuple[Header, Any]:
        self._nbytes = self._posted[0][1].numel()
        return super()._next_posted()

    def _checked_header(self, header: Header) -> Header:
        """Every message comes past here, before anybody learns of it, the one who measures how late messages are included."""
        seconds = self._nbytes / self._bandwidth if self._bandwidth else 0.0
        self._free = max(self._free, header.sent / 1e9) + seconds
        early = self._free + self._delay - time.monotonic()  # both ends have the same clock
        if early > 0:
            self.waiting(self.peer)
            time.sleep(early)
            self.waiting(None)
        return super()._checked_header(header)


def register() -> None:
    """Make the backend known to torch.distributed in this process, and the links in its place to pipelines."""
    LOCAL_LINKS["slow"] = LocalSender, LateReceiver
    if "slow" not in dist.Backend.backend_list:
        dist.Backend.register_backend("slow", SlowGroup, devices=["cpu"])
