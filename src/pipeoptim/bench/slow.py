"""A slow network between processes of one machine: gloo with messages that arrive late, the same for every contender.

A process group like any other to torch: ``register()`` makes ``init_process_group("slow")`` possible, and groups made later are
slow as well. A message from one process to another arrives ``delay`` after its last byte left, and bytes leave at ``bandwidth``,
one message after the other on each link of a group. The sender does not wait: a thread per link holds messages back. Collective
operations are not slowed down.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from typing import Any

import torch.distributed as dist

from pipeoptim.bench.processes import BANDWIDTH, DELAY

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


def register() -> None:
    """Make the backend known to torch.distributed in this process."""
    if "slow" not in dist.Backend.backend_list:
        dist.Backend.register_backend("slow", SlowGroup, devices=["cpu"])
