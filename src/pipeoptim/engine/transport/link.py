"""One direction between two neighbouring stages: messages in order, received ahead, sent without waiting.

A receiver posts the receive of the next message before anybody asks for that message, so that data move while the stage
computes; with slack, those of as many messages as may come before they are wanted (the *window* of the link), since some carriers
begin to send only when the receive is posted. The posted buffers have the size of the last message. When the format changes, the
sender first sends an empty message of the old size for each of them, which announces the new one; that costs messages only then::

    sender, stage k                                               receiver, stage k+1
                                                                  receive of 128 bytes posted
    message 0   header, following = n        --- 128 bytes --->   new format: receive n bytes
                header, description, tensors ---  n bytes  --->   message 0; receive of format.size bytes posted
    message 1   header, tensors              -- format.size -->   message 1, which arrived while the stage computed

A sender copies what it sends: the caller may overwrite its tensors, and one message costs one call. It reuses the buffers once the
peer has received them, so that a large message costs no new memory. How many messages the peer has received it says in the headers
of its own messages, in the other direction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.message import Message
from pipeoptim.engine.transport.ports import Incoming, Outgoing
from pipeoptim.engine.transport.unix_channel import UnixChannel
from pipeoptim.errors import CorruptionError, PipeOptimError, StageFailure, first_line

Waiting = Callable[[int | None], None]
"""Called with a stage before this process waits for it, and with None after the wait."""

NEVER = 2**63 - 1
"""Where no message has come yet."""

_TOGETHER = 64  # messages of which the least late one counts
_MOST_PENDING = 8  # messages on their way before a send waits, in a window of up to half as many


class LinkEnd:
    """What a sender and a receiver share: the peer, its group, and waits that name the peer when they fail.

    Attributes:
        checksums: whether messages carry a checksum: those that leave the machine, from host memory. TCP has one of 16 bits, which misses
            one damaged packet of 65,536, and it is often computed by the network card, behind the memory that may have been wrong.
        name: what the link carries, and between which stages.
    """

    opposite: LinkEnd | None = None  # to or from the same peer, see pair()

    def __init__(
        self,
        group: dist.ProcessGroup | UnixChannel,
        peer: int,
        rank: int,
        device: torch.device,
        timeout: float,
        waiting: Waiting,
    ) -> None:
        self.group, self.peer, self.device = group, peer, device
        self.channel = group if isinstance(group, UnixChannel) else None
        self.place = 0 if isinstance(group, UnixChannel) else dist.get_group_rank(group, rank)  # the peer's, in the group
        self.timeout = timedelta(seconds=timeout)
        self.waiting = waiting
        # Until a format is known, a bare header is awaited, which announces the first one.
        self.size = message.HEADER
        self.format: message.Format | None = None
        self.checksums = False
        self.name = f"link with stage {peer}"
        self.window = 1  # receives that are posted at a time; known to both ends
        # Counted on both ends and compared: calls in another order on two processes show in the first message.
        self.sequence = 0

    def wait(self, work: Any) -> None:
        # A heartbeat judges a neighbour that has ended only while somebody waits for it.
        self.waiting(self.peer)
        try:
            work.wait(self.timeout)
        except RuntimeError as error:
            raise StageFailure(self._reason(error)) from error
        finally:
            self.waiting(None)

    def interrupt(self) -> None:
        """End a wait of this process for the peer, from another thread, and all later ones; a group's end with its rendezvous."""
        if self.channel is not None:
            self.channel.interrupt()

    def close(self) -> None:
        """Give back what only this link uses."""
        self.opposite = None  # else the two would keep each other, and their groups
        if self.channel is not None:
            self.channel.close()

    def _reason(self, error: RuntimeError) -> str:
        first = first_line(error)
        # Words of gloo and of our own channels: torch raises a plain RuntimeError for everything.
        if "imed out" in str(error):
            return f"stage {self.peer} did not answer within {self.timeout.total_seconds():g} s ({first})"
        return f"stage {self.peer} died or closed its connection ({first})"


class MessageBuffer(NamedTuple):
    """Memory of one message.

    Attributes:
        memory: its bytes.
        places: where its tensors go, in ``memory`` or, where there is one, in ``copy``.
        form: the format of which it can take another message; None where it is used once.
        copy: on a device, what is copied to ``memory`` behind the program's back.
    """

    memory: Tensor
    places: list[Tensor | None]
    form: message.Format | None = None
    copy: Tensor | None = None


class Sender(LinkEnd):
    """Sends trees to stage ``peer``, whose process has global rank ``rank``."""

    opposite: Receiver | None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: deque[tuple[Any, MessageBuffer, int]] = deque()  # with the number of the message
        self._free: list[MessageBuffer] = []  # of messages in the present format
        self._broken: StageFailure | None = None

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        """Copy ``tree`` into a message and start sending it; waits only if the peer is several messages behind.

        ``flags``, ``loss_scale`` and ``share`` travel in the header (see :class:`~pipeoptim.engine.transport.message.Header`).
        """
        form, tensors = message.format_of(tree)
        self._finish_delivered()  # first, since it may free the buffer that this message can use
        if form != self.format:
            block = self._announce(form, flags, loss_scale, share)
        else:
            block = self._free.pop() if self._free else self._new_buffer(message.HEADER, form, self.format)
            message.put_header(
                block.memory, self.sequence, flags, loss_scale=loss_scale, share=share, taken=self._messages_taken()
            )
        self._start_send(block, tensors)
        self.sequence += 1

    def _announce(self, form: message.Format, flags: int, loss_scale: float, share: tuple[int, int]) -> MessageBuffer:
        """Announce a message in a new format. Returns the buffer of that message, its description written."""
        text = form.describe()
        start = message.HEADER + -(-len(text) // 64) * 64
        block = self._new_buffer(start, form, None)
        # In the old size and as many as that, since that is what the peer's posted receives wait for.
        for _ in range(self.window):
            notice = MessageBuffer(self._memory(self.size), [])
            message.put_header(notice.memory, self.sequence, flags, following=block.memory.numel())
            self._start_send(notice, [])
        described, taken = len(text), self._messages_taken()
        message.put_header(block.memory, self.sequence, flags, 0, described, loss_scale, share, taken)
        block.memory[message.HEADER : message.HEADER + len(text)].copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.format, self.size = form, form.size
        # Of the old size: they would never be taken again. Those still on their way are dropped by _finish_oldest().
        self._free.clear()
        return block

    def delivered(self, count: int) -> None:
        """The peer has received ``count`` messages."""
        # The peer has them, so that the waits in here end at once.
        while self._pending and self._pending[0][2] < count:
            self._finish_oldest()

    def hand_over(self) -> None:
        """Wait until everything is with the transport; here it always is."""

    def flush(self) -> None:
        """Wait until everything is sent."""
        while self._pending and self.channel is None:  # what lies in a channel arrives, even after this process has ended
            self._finish_oldest()
        if self._broken is not None:
            raise self._broken

    def _new_buffer(self, start: int, form: message.Format, again: message.Format | None) -> MessageBuffer:
        """A buffer for a message in format ``form`` whose tensors begin at byte ``start``; reused for messages in format ``again``."""
        memory = self._memory(start + form.payload)
        return MessageBuffer(memory, message.places(memory, start, form), again)

    def _messages_taken(self) -> int:
        return 0 if self.opposite is None else self.opposite.sequence

    def _memory(self, size: int) -> Tensor:
        if self.channel is not None:
            return self.channel.memory(size)
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _finish_delivered(self) -> None:
        """Take back the buffers that the peer has received; wait only where it is many messages behind, so that memory stays bounded."""
        most = max(_MOST_PENDING, 2 * self.window)
        while self._pending and (len(self._pending) > most or self._pending[0][0].is_completed()):
            self._finish_oldest()
        if self._broken is not None:
            raise self._broken

    def _finish_oldest(self) -> None:
        work, block, _ = self._pending.popleft()
        self.wait(work)
        # By identity: an equal format that was announced again later has buffers of its own.
        if block.form is not None and block.form is self.format:
            self._free.append(block)

    def _start_send(self, block: MessageBuffer, tensors: list[Tensor]) -> None:
        """Fill ``block`` with ``tensors`` and begin to send it."""
        message.fill(block.places, tensors)
        if self.checksums:
            message.put_checksum(block.memory)
        try:
            # The buffer is held here until the send is complete: the transport reads from it after this call.
            self._pending.append((self.group.send([block.memory], self.place, 0), block, self.sequence))
        except RuntimeError as error:
            # Raised with the next message: a script that ends without a drain leaves gradients that nobody waits for.
            self._broken = StageFailure(self._reason(error))


class Receiver(LinkEnd):
    """Receives trees from stage ``peer``. ``ahead`` posts the next receives as soon as a message was taken."""

    opposite: Sender | None

    _read_tree = staticmethod(message.read)

    def __init__(self, *args: Any, ahead: bool) -> None:
        super().__init__(*args)
        self.ahead = ahead
        # Nanoseconds from the sending of a message to its end here, by the clocks of both ends: the least so far, of the present
        # messages, and of those before.
        self.least_late = self._late_now = self._late_before = NEVER
        self._posted: deque[tuple[Any, Tensor]] = deque()

    @property
    def lately_late(self) -> int:
        """As :attr:`least_late`, of the last 64 to 128 messages; :data:`NEVER` before the first."""
        return min(self._late_now, self._late_before)

    def post_receive(self) -> None:
        """Be ready for the next messages."""
        while len(self._posted) < self.window:
            self._posted.append(self._begin_receive(self.size))

    def receive(self) -> Message:
        """The next message, its tensors leaves of a new graph. Blocks until it is there."""
        self.post_receive()
        header, block = self._next_posted()
        if header.following:
            return self._receive_described(header.following)
        if self.format is None:
            raise PipeOptimError(f"the first message from stage {self.peer} has no description")
        self._note_taken(header)
        return Message(
            self._read_tree(block, message.HEADER, self.format), header.flags, header.loss_scale, (header.rows, header.of)
        )

    def _next_posted(self) -> tuple[message.Header, Tensor]:
        """What comes into the receive that was posted first: its header, and all of it."""
        work, block = self._posted.popleft()
        self.wait(work)
        header = self._checked_header(message.get_header(block))
        if header.checksum and header.checksum != message.checksum(block):
            raise CorruptionError(
                f"message {self.sequence} of the {self.name} has another checksum than it was sent with: memory, a network card or a link "
                "is faulty; go on from the newest checkpoint elsewhere"
            )
        return header, block

    def _receive_described(self, size: int) -> Message:
        """A message in a new format, which was announced with its ``size``."""
        while self._posted:  # of the old size: the sender has announced it to each of them
            self._next_posted()
        self._posted.append(self._begin_receive(size))
        header, block = self._next_posted()
        text = bytes(block[message.HEADER : message.HEADER + header.described].cpu().numpy())
        form, start = message.Format.parse(text), message.HEADER + -(-header.described // 64) * 64
        # Before memory is taken for the next messages of this format, and before its tensors are looked for in this one.
        if start + form.payload != size:
            raise PipeOptimError(f"a message of {size} bytes from stage {self.peer} describes {start + form.payload} bytes")
        self.format, self.size = form, form.size
        self._note_taken(header)
        try:
            tree = self._read_tree(block, start, form)
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
        ) as error:  # contents that do not fit their containers
            raise PipeOptimError(f"a message from stage {self.peer} has no valid description ({error})") from error
        return Message(tree, header.flags, header.loss_scale, (header.rows, header.of))

    def note_late(self, header: message.Header) -> None:
        """How late the message has come that was received last."""
        late = monotonic_ns() - header.sent
        if late < self.least_late:
            self.least_late = late
        if not self.sequence % _TOGETHER:
            self._late_before, self._late_now = self._late_now, NEVER
        if late < self._late_now:
            self._late_now = late

    def _note_taken(self, header: message.Header) -> None:
        """A message was received: post the receive of the next one, and free the buffers of ours that the peer has received."""
        self.sequence += 1
        self.note_late(header)
        if self.ahead:
            with suppress(StageFailure):  # a peer that has sent its last may be gone; the next receive() fails if one is needed
                self.post_receive()
        if self.opposite is not None:
            self.opposite.delivered(header.taken)

    def _begin_receive(self, size: int) -> tuple[Any, Tensor]:
        # New memory for every message: its tensors are views of it and live as long as the stage's graph wants them.
        try:
            block = torch.empty(size, dtype=torch.uint8, device=self.device)  # the size is the peer's word
            return self.group.recv([block], self.place, 0), block
        except RuntimeError as error:
            raise StageFailure(self._reason(error)) from error

    def _checked_header(self, header: message.Header) -> message.Header:
        if not message.is_ours(header) or header.sequence != self.sequence:
            raise PipeOptimError(
                f"message {self.sequence} from stage {self.peer} is out of order (got {header.sequence}): do all processes "
                "call step, drain and eval_step in the same order?"
            )
        return header


def pair(sender: Sender | None, receiver: Receiver | None) -> None:
    """Join both ends to one neighbour: messages in one direction say how many were received in the other."""
    if sender is not None and receiver is not None:
        sender.opposite, receiver.opposite = receiver, sender


class LinkObserver(Protocol):
    """Watches the links of one stage, for a trace. Where there is none, links are used as they are, at no cost."""

    def incoming(self, link: Receiver) -> Incoming:
        """``link``, as the stage is to use it."""
        ...

    def outgoing(self, link: Sender) -> Outgoing:
        """``link``, as the stage is to use it."""
        ...

    def waiting(self, waiting: Waiting) -> Waiting:
        """What the links are to call before and after each wait, in place of ``waiting``."""
        ...
