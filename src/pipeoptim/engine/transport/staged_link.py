"""Links of a stage on a device whose messages travel in host memory: copies to and from the device that overlap with computation.

Gloo and the channels of one machine carry host memory only. With a plain copy, the program would wait until the device has computed
each message, once per F and once per B, and the device would then idle while the program prepares what comes next::

    computing    ... F, copy to a buffer | next F ...        ... F, once the copy in is over ...
    copying out                          | buffer -> pinned memory
    thread                                                 | send
    receiving                                                    | pinned memory <- message
    copying in                                                   | pinned memory -> device

- A sender copies its tensors on the device, in the order of computation (the caller may overwrite them, as with every sender),
  and from there into pinned memory on a stream of its own. A thread waits for that copy and passes the message to the transport.
- A receiver receives into pinned memory, copies to the device on another stream, and makes the next computation wait for that copy,
  not the program. The memory on the device was allocated when the receive was posted: the copy waits for the computation until then,
  which may still use that memory, and for nothing later.
- Headers stay on the host.

What it costs: a thread per neighbour to send to, which shares Python's lock with the program and keeps a core busy while it waits, as
torch's events cannot be waited for in another way; one more copy on the device; and for large messages to another process of this
machine one more copy in host memory, since memory that two processes share is not pinned.

The tests run it without a GPU, with copies that happen as late as they may.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.backend import uses_gloo
from pipeoptim.engine.transport.link import MessageBuffer, Receiver, Sender
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.unix_channel import UnixChannel
from pipeoptim.errors import PipeOptimError, StageFailure

_MOST_WAITING = 8  # buffers that may wait to be reused before the program waits for one


class SideStreams:
    """The copies of one stage, on streams beside the one that computes: the stream that is current when a method is called.

    Args:
        device: of the stage; one with streams, events and pinned memory, as GPUs have.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream per direction, so that a copy out that waits for the computation does not hold up one in.
        self._out, self._in = torch.Stream(device), torch.Stream(device)

    def pinned(self, size: int) -> Tensor:
        """Bytes of host memory that the device can copy by itself."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int) -> Tensor:
        """Bytes on the device, for use in the order of computation."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def fill(self, places: list[Tensor | None], tensors: list[Tensor]) -> None:
        """Copy on the device, in the order of computation."""
        message.fill(places, tensors)

    def now(self) -> torch.Event:
        """An event that is over when everything submitted until now has been computed."""
        # Without timing, an event is cheaper to record.
        event = torch.Event(self.device, enable_timing=False)
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def copy_out(self, host: Tensor, block: Tensor, after: torch.Event) -> torch.Event:
        """Copy ``block`` from the device to pinned memory once ``after`` is over; what is returned is over when that is done."""
        return self._copy(self._out, host, block, after)

    def copy_in(self, block: Tensor, host: Tensor, after: torch.Event) -> torch.Event:
        """Copy pinned memory to ``block`` on the device once ``after`` is over; what is returned is over when that is done."""
        return self._copy(self._in, block, host, after)

    def _copy(self, stream: torch.Stream, to: Tensor, source: Tensor, after: torch.Event) -> torch.Event:
        # The stream waits on the device; the program goes on at once.
        stream.wait_event(after)
        with stream:
            to.copy_(source, non_blocking=True)
        return stream.record_event()

    def compute_after(self, event: torch.Event) -> None:
        """Let what is computed from now on wait for ``event``; the program does not wait."""
        torch.accelerator.current_stream(self.device).wait_event(event)


def side_streams(device: torch.device) -> SideStreams | None:
    """Those of a stage on ``device``; None where messages are sent from the memory that they are in already."""
    return SideStreams(device) if device.type != "cpu" and uses_gloo(device.type) else None


class StagedSender(Sender):
    """As :class:`~pipeoptim.engine.transport.link.Sender`, from a device. A send is complete when the transport has the message."""

    def __init__(self, streams: SideStreams, *args: Any) -> None:
        super().__init__(*args)
        self._streams = streams
        self._courier = _Courier(self.group, self.place, self.timeout)
        # one thread, so that messages keep their order; it ends with the link, or with the program, after the last message
        self._thread = ThreadPoolExecutor(1, "pipeoptim-send")

    def hand_over(self) -> None:
        """Wait until all messages have left the device and are with the transport."""
        for work, *_ in self._pending:
            self.wait(work.handed)

    def flush(self) -> None:
        """Wait until everything is sent."""
        self.hand_over()
        super().flush()

    def close(self) -> None:
        """Give back what only this link uses; a message that still waits for the device or for its peer is lost."""
        # The thread looks at it before each message, so that none goes to a transport that is being closed.
        self._courier.closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _new_buffer(self, start: int, form: message.Format, again: message.Format | None) -> MessageBuffer:
        # Only the payload is staged on the device: the header is written by the program, into the pinned part.
        copy = self._streams.empty(form.payload)
        return MessageBuffer(self._memory(start + form.payload), message.places(copy, 0, form), again, copy)

    def _memory(self, size: int) -> Tensor:
        return self._streams.pinned(size)

    def _start_send(self, block: MessageBuffer, tensors: list[Tensor]) -> None:
        copied = None
        if block.copy is not None and block.copy.numel():
            self._streams.fill(block.places, tensors)
            # The tensors are the end of the message in every format, whether a description lies before them or not.
            payload = block.memory[-block.copy.numel() :]
            copied = self._streams.copy_out(payload, block.copy, self._streams.now())
        leaving = _Leaving(self._thread.submit(self._courier.hand, block, copied, self.checksums))
        self._pending.append((leaving, block, self.sequence))


class _Courier:
    """Passes messages to the transport, one after the other, in the thread of a sender."""

    def __init__(self, group: dist.ProcessGroup | UnixChannel, place: int, timeout: timedelta) -> None:
        self.group, self.place, self.timeout = group, place, timeout
        self.closed = False
        self._failed: Exception | None = None
        self._shared: deque[tuple[Any, Tensor]] = deque()  # blocks that the peer reads, or has read

    def hand(self, block: MessageBuffer, copied: torch.Event | None, checksum: bool) -> Any:
        """Wait until ``block`` has left the device and pass it to the transport. Returns None where it can be reused at once."""
        if self._failed is not None:
            raise self._failed  # a message was lost: those after it would be out of order
        try:
            if copied is not None:
                self._wait_for(copied)
            if self.closed:
                return None
            if isinstance(self.group, UnixChannel):
                return self._put(self.group, block.memory)
            if checksum:  # here, as the device has written the memory only now
                message.put_checksum(block.memory)
            return self.group.send([block.memory], self.place, 0)
        except Exception as error:
            self._failed = error
            raise

    def _wait_for(self, copied: torch.Event) -> None:
        try:
            copied.synchronize()
        except RuntimeError as error:
            raise PipeOptimError(f"the device failed before a message had been copied from it: {error}") from error

    def _put(self, channel: UnixChannel, memory: Tensor) -> None:
        channel.wait_at_most(self.timeout)
        if memory.numel() <= channel.small:
            channel.send([memory], self.place, 0)
            return
        block = self._shared_block(channel, memory.numel())
        # Host to host: by now the device has written the pinned memory, which is free again when this returns.
        block.copy_(memory)
        self._shared.append((channel.send([block], self.place, 0), block))

    def _shared_block(self, channel: UnixChannel, size: int) -> Tensor:
        if self._shared and self._shared[-1][1].numel() != size:
            self._shared.clear()  # as the channel does when the size changes
        if self._shared and (len(self._shared) > _MOST_WAITING or self._shared[0][0].is_completed()):
            sent, block = self._shared.popleft()
            sent.wait(self.timeout)
            return block
        return channel.memory(size)


class _Leaving:
    """A message on its way out, as a sender waits for it: off the device, then through the transport."""

    def __init__(self, handed: Future[Any]) -> None:
        self.handed = _Handed(handed)

    def is_completed(self) -> bool:
        """Whether its buffer can be reused, or never will be."""
        future = self.handed.future
        if not future.done():
            return False
        # After a failure the buffer is done with, too; the error itself is raised by wait().
        return future.exception() is not None or future.result() is None or bool(future.result().is_completed())

    def wait(self, timeout: timedelta) -> None:
        """Until its buffer can be reused."""
        sent = self.handed.wait(timeout)
        if sent is not None:
            sent.wait(timeout)


class _Handed:
    """The first half of that."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = future

    def wait(self, timeout: timedelta) -> Any:
        """Until the transport has the message; what the transport returned."""
        try:
            return self.future.result(timeout.total_seconds())
        except TimeoutError:
            raise RuntimeError("timed out before the message had left the device or its peer took it") from None


class StagedReceiver(Receiver):
    """As :class:`~pipeoptim.engine.transport.link.Receiver`, to a device."""

    def __init__(self, streams: SideStreams, *args: Any, ahead: bool) -> None:
        super().__init__(*args, ahead=True)
        self._streams = streams
        self._device_memory: deque[tuple[Tensor, torch.Event]] = (
            deque()
        )  # memory on the device for messages whose receive is posted
        self._read_from: deque[tuple[torch.Event, Tensor]] = (
            deque()
        )  # pinned memory that the device copies from, or has copied from

    def _begin_receive(self, size: int) -> tuple[Any, Tensor]:
        host = self._pinned(size)
        try:
            work = self.group.recv([host], self.place, 0)
        except RuntimeError as error:
            raise StageFailure(self._reason(error)) from error
        # Allocated now and marked with an event: what was computed in this memory before must be over when the copy begins.
        self._device_memory.append((self._streams.empty(size), self._streams.now()))
        return work, host

    def _receive_described(self, size: int) -> Message:
        self._device_memory.clear()  # that of the empty messages, which announced this one
        return super()._receive_described(size)

    def _read_tree(self, host: Tensor, start: int, form: message.Format) -> Any:
        memory, free = self._device_memory.popleft()
        copied = self._streams.copy_in(memory, host, free)
        # On the device: the program goes on and queues the forward, which begins when the message is there.
        self._streams.compute_after(copied)
        # Held until the copy is over; its memory then serves a later receive.
        self._read_from.append((copied, host))
        return message.read(memory, start, form)

    def _pinned(self, size: int) -> Tensor:
        while self._read_from and (len(self._read_from) > _MOST_WAITING or self._read_from[0][0].query()):
            copied, host = self._read_from.popleft()
            copied.synchronize()
            if host.numel() == size:
                return host
        return self._streams.pinned(size)
