"""Messages between two stages whose processes may die and be replaced: numbered, and kept until nobody can ask for them again.

A stage that was replaced has gone back to its *image*, the state that it had some mini-batches ago (see
:mod:`pipeoptim.engine.processes.standby`). It asks for what it had received since then, and sends again what it had sent::

    stage k           log: messages n, n+1, ..., kept since the newest image of stage k + 1
        |  ^
        |  |          one connection; where it breaks, a new one, which begins with
        |  |              "I have r of your messages"      -> the other sends its log from r on
        v  |          a stage that does again what it has done sends nothing below the other's r
    stage k + 1       each message says how many of the other's messages the sender's newest image holds: the other forgets those

Stages are deterministic, so that a message which is sent again has the bits of the first one. Large messages lie in memory
(:mod:`~pipeoptim.engine.transport.kept_memory`) whose descriptor passes through the socket, so that sending one never waits for a stage
that computes. The log is that memory: a message is copied into it once. Between machines (``apart``) a large message goes through the
socket as well, with a checksum; whoever waits to send one takes in what comes meanwhile, in whatever pieces.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.hung_up import has_hung_up
from pipeoptim.engine.transport.kept_memory import KeptMemory, KeptSlot
from pipeoptim.engine.transport.message import Message
from pipeoptim.errors import CorruptionError, PipeOptimError, StageFailure

Dial = Callable[[float], socket.socket]
"""Makes a new connection to the neighbour within so many seconds; raises StageFailure where none comes."""

_HEAD = struct.Struct("<6qd2q")  # see _Head
_GREETING = struct.Struct("<q")
_CHECKSUM = struct.Struct("<I")  # behind a message to another machine
_INLINE = 32768  # bytes; up to here a message goes through the socket itself
_BUFFER = 1 << 19  # of the socket
_LOOK = 0.02  # seconds between looks at the other connections while this one is waited on


class _Head(NamedTuple):
    """Sizes of description and payload, where the payload lies in the memory whose descriptor comes next (-1: it comes itself), the
    message's number, how many of the receiver's messages the sender's newest image holds; the rest as in
    :class:`~pipeoptim.engine.transport.message.Message`."""

    described: int
    payload: int
    offset: int
    sequence: int
    held: int
    flags: int
    loss_scale: float
    rows: int
    of: int


class _Sent(NamedTuple):
    """A message that can be sent again: what describes it, and its payload, which lies in ``slot`` if it is large."""

    head: _Head
    text: bytes
    block: Tensor
    slot: KeptSlot | None


class KeptLink:
    """Both directions between a stage and stage ``peer``: the :class:`~pipeoptim.engine.transport.ports.Incoming` and the
    :class:`~pipeoptim.engine.transport.ports.Outgoing` of its runner.

    Args:
        peer: the neighbour.
        dial: makes a connection to it, and a new one whenever one has broken.
        timeout: seconds that a message may take.
        serve: called while this link waits; looks after the stage's other links.
        apart: the neighbour is on another machine, with which no memory is shared.
    """

    def __init__(self, peer: int, dial: Dial, timeout: float, serve: Callable[[], None], apart: bool = False) -> None:
        self.peer, self.timeout, self.apart = peer, timeout, apart
        self._dial, self._serve = dial, serve
        self._connection: socket.socket | None = None
        self._closed = False
        self._inbox = bytearray()  # what came while this end waited to send, if apart
        self._log: deque[_Sent] = deque()
        self._memory: KeptMemory | None = None  # of large messages
        self._sent = self._received = 0
        self._other_has = 0  # messages that need not be sent: the other had them when the connection was made
        self._at_image = self._held = 0  # messages received when an image was made; when the newest that stands was
        self._queue: deque[Message] = deque()  # received, not taken yet
        self._form: message.Format | None = None
        self._text = b""
        self._read_form: tuple[bytes, message.Format] | None = None

    # -- what a runner calls -------------------------------------------------------------------------------------------

    def send(self, tree: Any, flags: int = 0, loss_scale: float = 0.0, share: tuple[int, int] = (0, 0)) -> None:
        """As :meth:`~pipeoptim.engine.transport.ports.Outgoing.send`."""
        form, tensors = self._format(tree)
        slot = self._take_slot(form.payload) if form.payload > _INLINE and not self.apart else None
        block = torch.empty(form.payload, dtype=torch.uint8) if slot is None else slot.block[: form.payload]
        message.fill(message.places(block, 0, form), tensors)
        offset = -1 if slot is None else slot.offset
        head = _Head(len(self._text), form.payload, offset, self._sent, self._held, flags, loss_scale, *share)
        sent = _Sent(head, self._text, block, slot)
        self._log.append(sent)
        self._sent += 1
        if self._connection is None:
            self.restore()
        elif head.sequence >= self._other_has:
            try:
                self._transmit(sent)
            except OSError:
                self.restore()

    def post_receive(self) -> None:
        """Nothing to prepare: messages wait in the socket."""

    def receive(self) -> Message:
        """As :meth:`~pipeoptim.engine.transport.ports.Incoming.receive`; waits for a neighbour that is being replaced, too."""
        end = time.monotonic() + self.timeout
        while not self._queue:
            if time.monotonic() > end:
                raise StageFailure(f"stage {self.peer} did not answer within {self.timeout:g} s")
            try:
                if self._connection is None:
                    self.restore()
                elif self._readable(_LOOK):
                    self._read_message()
                else:
                    self._serve()
            except OSError:
                self.restore()
        return self._queue.popleft()

    # -- images --------------------------------------------------------------------------------------------------------

    def note_image(self) -> None:
        """An image of this process is made now."""
        self._at_image = self._received

    def note_standing(self) -> None:
        """The image that was made last can take this process's place: what the one before needed can be forgotten."""
        self._held = self._at_image

    def note_takeover(self) -> None:
        """This process was an image: from its free slots the neighbour may still read what the process before has sent in them."""
        self._memory = None

    @property
    def replays(self) -> bool:
        """Whether what is sent now was sent before; also where nobody has said so yet."""
        return self._connection is None or self._sent < self._other_has

    # -- connections ---------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Let go of the connection; the next message makes a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._inbox.clear()  # it counts as not received, and comes again

    def close(self) -> None:
        """Let go of all, for good."""
        self._closed = True
        self.drop()
        self._log.clear()
        self._memory = None

    def look_after(self) -> None:
        """Make a new connection if there is none, or the neighbour has let go of this one, and it is there.

        It is not waited for: perhaps it has done its work and ended, and what this process waits for elsewhere is there already. But it may
        wait for this connection itself before it does what this process waits for: where both have just taken over, none has one.
        """
        if not self._closed and (self._connection is None or has_hung_up(self._connection)):
            try:
                connection = self._dial(_LOOK)
            except StageFailure:
                return
            self.drop()
            with suppress(OSError):  # it has died again, which the next look sees
                self._begin(connection)

    def restore(self) -> None:
        """Connect anew, and send what the neighbour lacks."""
        end = time.monotonic() + self.timeout
        while True:
            self.drop()
            connection = self._dial(max(0.0, end - time.monotonic()))
            try:
                self._begin(connection)
                return
            except OSError:
                if time.monotonic() > end:
                    raise StageFailure(f"stage {self.peer} could not be connected again within {self.timeout:g} s") from None

    def _begin(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        connection.setblocking(True)
        self._connection = connection
        connection.sendall(_GREETING.pack(self._received))
        (self._other_has,) = _GREETING.unpack(self._read_exactly(_GREETING.size))
        missing = self._log[0].head.sequence if self._log else self._sent
        if self._other_has < missing:
            raise StageFailure(
                f"stage {self.peer} asks for message {self._other_has}, but messages before {missing} are forgotten; resume from the "
                "newest checkpoint"
            )
        for sent in list(self._log):
            if sent.head.sequence >= self._other_has:
                self._transmit(sent)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _take_slot(self, size: int) -> KeptSlot:
        if self._memory is None or self._memory.size < size:
            self._memory = KeptMemory(size)
        return self._memory.take()

    def _forget(self, count: int) -> None:
        """No image of the neighbour will ask for the first ``count`` messages again."""
        while self._log and self._log[0].head.sequence < count:
            slot = self._log.popleft().slot
            if slot is not None and self._memory is not None:
                self._memory.give_back(slot)

    def _format(self, tree: Any) -> tuple[message.Format, list[Tensor]]:
        tensors = None if self._form is None else message.unchanged(tree, self._form)
        if tensors is None or self._form is None:
            self._form, tensors = message.format_of(tree)
            self._text = self._form.describe()
        return self._form, tensors

    def _transmit(self, sent: _Sent) -> None:
        """Send all of it. While the socket is full, what comes the other way is read: the neighbour may be in the same place."""
        assert self._connection is not None
        head = _HEAD.pack(*sent.head._replace(held=self._held))
        parts = [memoryview(head + sent.text)]
        parts += [_bytes_of(sent.block)] if sent.slot is None and sent.head.payload else []
        parts += [memoryview(_checksum_of(parts))] if self.apart else []
        for rest in parts:
            while rest:
                try:
                    rest = rest[self._connection.send(rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    self._wait_until_writable()
        if sent.slot is not None:
            self._send_descriptor(self._connection, sent.slot.file.descriptor)

    def _send_descriptor(self, connection: socket.socket, descriptor: int) -> None:
        """Of memory that the other end reads when it has time."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
        while True:
            try:  # not by socket.send_fds, which ignores its flags
                connection.sendmsg([b"+"], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                return
            except BlockingIOError:
                self._wait_until_writable()

    def _wait_until_writable(self) -> None:
        assert self._connection is not None
        look = select.poll()
        look.register(self._connection, select.POLLIN | select.POLLOUT)
        for _, events in look.poll(_LOOK * 1000):
            if events & select.POLLIN and self.apart:
                # Not a whole message: the other may be in the middle of one, and wait for this end to read in the same way.
                self._inbox += _some(self._connection)
            elif events & select.POLLIN:
                self._read_message()

    def _readable(self, seconds: float) -> bool:
        assert self._connection is not None
        if self._inbox:
            return True
        look = select.poll()
        look.register(self._connection, select.POLLIN)
        return bool(look.poll(seconds * 1000))

    def _read_message(self) -> None:
        """Read the next message, whose beginning is there."""
        connection = self._connection
        assert connection is not None
        began = self._read_exactly(_HEAD.size)
        head = _Head(*_HEAD.unpack(began))
        if head.sequence != self._received:
            raise PipeOptimError(
                f"message {self._received} from stage {self.peer} is out of order (got {head.sequence}): do all processes "
                "call step, drain and eval_step in the same order?"
            )
        text = bytes(self._read_exactly(head.described))
        if self._read_form is None or self._read_form[0] != text:
            self._read_form = text, message.Format.parse(text)
        form = self._read_form[1]
        if form.payload != head.payload:
            raise PipeOptimError(f"a message of {head.payload} bytes from stage {self.peer} describes {form.payload} bytes")
        block = torch.empty(head.payload, dtype=torch.uint8)
        if head.offset >= 0:
            _receive_apart(connection, head.offset, block)
        elif head.payload:
            self._read_into(_bytes_of(block))
        if self.apart and self._read_exactly(_CHECKSUM.size) != _checksum_of([began, text, _bytes_of(block)]):
            raise CorruptionError(
                f"message {self._received} from stage {self.peer} has another checksum than it was sent with: memory, a network card or a "
                "link is faulty; go on from the newest checkpoint elsewhere"
            )
        self._received += 1
        self._queue.append(Message(message.read(block, 0, form), head.flags, head.loss_scale, (head.rows, head.of)))
        self._forget(head.held)

    def _read_exactly(self, size: int) -> bytearray:
        found = bytearray(size)
        self._read_into(memoryview(found))
        return found

    def _read_into(self, place: memoryview) -> None:
        assert self._connection is not None
        count = min(len(place), len(self._inbox))
        place[:count] = self._inbox[:count]
        del self._inbox[:count]
        place = place[count:]
        while place:
            count = self._connection.recv_into(place, len(place), socket.MSG_WAITALL)
            if not count:
                raise ConnectionError("the connection was closed")
            place = place[count:]


def _bytes_of(block: Tensor) -> memoryview:
    return memoryview(cast(Any, block.numpy()))


def _checksum_of(parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """CRC-32 of ``parts``: TCP's own has 16 bits, which miss one damaged message of 65,536."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return _CHECKSUM.pack(value)


def _receive_apart(connection: socket.socket, offset: int, block: Tensor) -> None:
    """Fill ``block`` from the memory whose descriptor comes next."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise ConnectionError("a message came without its memory")
    try:
        rest = _bytes_of(block)
        while rest:
            count = os.preadv(descriptors[0], [rest], offset + block.numel() - len(rest))
            if not count:
                raise PipeOptimError(f"a message of {block.numel()} bytes came in less memory")
            rest = rest[count:]
    finally:
        os.close(descriptors[0])


def _some(connection: socket.socket) -> bytes:
    """What has come."""
    found = connection.recv(_BUFFER, socket.MSG_DONTWAIT)
    if not found:
        raise ConnectionError("the connection was closed")
    return found


class LinkSet:
    """The links of a process, each of which looks after the others while it waits."""

    def __init__(self) -> None:
        self.links: list[KeptLink] = []

    def __iter__(self) -> Iterator[KeptLink]:
        return iter(self.links)

    def add(self, peer: int, dial: Dial, timeout: float, apart: bool = False) -> KeptLink:
        """A new link."""
        link = KeptLink(peer, dial, timeout, self.look_after, apart)
        self.links.append(link)
        return link

    def look_after(self) -> None:
        """Connect again to neighbours that were replaced."""
        for link in self.links:
            link.look_after()
