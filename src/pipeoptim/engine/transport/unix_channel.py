"""Messages between processes of one machine: small ones through a ring in shared memory, large ones through blocks of it.

Through a process group of gloo, a message on one machine takes a TCP connection and two more threads, which cost more than the
message. A channel needs neither::

    sender                                      ring                        receiver
    small    its tensors           --- header and tensors --->              its tensors
    large    copies into block n   --- record: n, size, new? --->           maps block n if it is new (the descriptor comes along),
                                                                            copies it out
             may reuse block n     <---------- one byte ---------

The socket beside the ring wakes a receiver that sleeps, carries descriptors, and ends when a process does. Where there is no ring (see
:mod:`pipeoptim.engine.transport.shared_ring`), what it carries goes through the socket as well. What a process has sent arrives even after
it has ended, and a process that dies closes its sockets, which ends the waits of its neighbours.

A channel has the methods of a process group that a link calls (see :mod:`pipeoptim.engine.transport.link`). Which neighbours have
one is found out when they connect: processes on two machines cannot reach each other's sockets, and use their group::

    stage k + 1   listens, puts its address and a secret token into the store     answers: checks the token of each caller
    stage k                                      reads them, connects twice, sends the token and the direction
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from pipeoptim.engine.transport.hung_up import has_hung_up
from pipeoptim.engine.transport.same_user import is_same_user
from pipeoptim.engine.transport.shared_ring import SharedRing, make_ring_memory
from pipeoptim.errors import ConfigError, StageFailure

TRANSPORTS = ("auto", "group")
_RECORD = struct.Struct("<3q")  # number of the block, its size, and whether its descriptor follows
_DESCRIPTOR = struct.Struct("i")
_ANCILLARY = socket.CMSG_SPACE(_DESCRIPTOR.size)
_TOKEN = 16  # bytes of the secret that a caller must send: any process may connect to an abstract socket
_CALLERS = 16  # that may wait to be answered: one neighbour, twice, and whoever has no business there
SMALL = 32768
"""Largest message that goes through ring or socket itself, in bytes: up to here that costs no more than the record of a block."""
_WAITING = 8 * SMALL  # in all: with more messages before they are wanted, each of them must be smaller, or a send would wait
_BUFFER = 16 * SMALL  # of ring and socket: several small messages fit before a send waits


def check_transport(transport: str) -> None:
    """Raises ConfigError for another name than those of ``TRANSPORTS``."""
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        raise ConfigError(
            f"transport is {transport!r}, must be 'auto' (shared memory between processes of one machine, else the process "
            "group) or 'group' (always the process group)"
        )


def _bytes_of(block: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a block, as a buffer."""
    return (ctypes.c_char * block.numel()).from_address(block.data_ptr())


def _closed_error(error: OSError | None = None) -> RuntimeError:
    return RuntimeError("connection closed by peer" + (f" ({error.strerror})" if error else ""))


def _remaining_views(buffers: list[Any], count: int) -> Iterator[memoryview]:
    """What remains of ``buffers`` after the first ``count`` bytes."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if count < view.nbytes:
            yield view[count:]
        count = max(0, count - view.nbytes)


class UnixChannel:
    """One end of one direction between two processes; one of them sends, the other receives. Both know the size of the next message.

    Args:
        connection: a connected Unix stream socket.
        window: messages that may come before they are wanted.
        ring: for small messages; both ends have one, or neither has.

    Attributes:
        small: the largest message that goes through ring or socket; the same at both ends.
    """

    def __init__(self, connection: socket.socket, window: int = 1, ring: SharedRing | None = None) -> None:
        self._socket, self._ring = connection, ring
        self.small = min(SMALL, _WAITING // window)
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._timeout: timedelta | None = None
        self._sent = self._taken = 0  # blocks sent, and how many of them the peer has copied out
        self._unsent: dict[int, int] = {}  # address -> descriptor of blocks that the peer does not know yet
        self._known: dict[int, int] = {}  # address -> number of the others
        self._theirs: dict[int, Tensor] = {}  # number -> the peer's block
        self._numbers = 0
        self._size = 0  # of the last block; when it changes both ends forget those of the old size
        self._descriptors: deque[int] = deque()  # that came with a byte which woke this end

    def put(self, buffers: list[Any], size: int) -> None:
        """Send a small message that consists of these buffers, ``size`` bytes. It is copied before the call returns.

        Raises:
            RuntimeError: the peer has closed its end.
        """
        if self._ring is not None:
            self._put_into_ring(self._ring, buffers, size)
            return
        try:
            # One system call for header, tensors and padding, wherever in memory they lie.
            count = self._socket.sendmsg(buffers)
            for buffer in _remaining_views(buffers, count) if count < size else ():  # a signal interrupted the call
                self._socket.sendall(buffer)
        except BlockingIOError:
            raise RuntimeError("timed out") from None
        except OSError as error:
            raise _closed_error(error) from error

    def get(self, buffers: list[Any], size: int) -> None:
        """Wait for a message of ``size`` bytes, that of all these buffers, and fill them.

        Raises:
            RuntimeError: none came in time, or the peer has closed its end.
        """
        if self._ring is not None:
            if not self._ring.holds_message():
                self._sleep_until_message(self._ring)
            self._ring.get(buffers, size)
            return
        try:
            # WAITALL: one call even where the message arrives in pieces.
            count, *_ = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)
            for buffer in _remaining_views(buffers, count) if 0 < count < size else ():
                while buffer:
                    count = self._socket.recv_into(buffer)
                    if not count:
                        break
                    buffer = buffer[count:]
        except BlockingIOError:
            raise RuntimeError("timed out") from None
        except OSError as error:
            raise _closed_error(error) from error
        if not count:
            raise _closed_error()

    def _put_into_ring(self, ring: SharedRing, buffers: list[Any], size: int) -> None:
        if ring.is_closed():
            raise _closed_error()
        if not ring.has_room(size):
            self._sleep_until_room(ring, size)
        if ring.put(buffers, size):
            try:
                self._socket.send(b".", socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # full of bytes that wake the receiver
            except OSError as error:
                raise _closed_error(error) from error

    def _sleep_until_room(self, ring: SharedRing, size: int) -> None:
        """Rare: the receiver is further behind than the order of the actions allows."""
        began = time.monotonic()
        while not ring.has_room(size):
            waited = time.monotonic() - began
            if self._timeout is not None and waited > self._timeout.total_seconds():
                raise RuntimeError("timed out")
            if ring.is_closed() or has_hung_up(self._socket):
                raise _closed_error()
            time.sleep(min(max(waited / 8, 2e-5), 1e-3))

    def _sleep_until_message(self, ring: SharedRing) -> None:
        ring.sleeps(True)
        try:
            while not ring.holds_message():
                # A byte may be left over from a message that was found without it; descriptors come with theirs.
                if not self._next_byte() and not ring.holds_message():
                    raise _closed_error()
        finally:
            ring.sleeps(False)

    # -- as a process group ------------------------------------------------------------------------------------------

    def memory(self, size: int) -> Tensor:
        """A block of bytes that :meth:`send` takes."""
        if size <= self.small:
            return torch.empty(size, dtype=torch.uint8)
        fd = os.memfd_create("pipeoptim-message")
        os.ftruncate(fd, size)
        block = torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
        self._known.pop(block.data_ptr(), None)  # an older block may have been freed and this one mapped at its address
        self._unsent[block.data_ptr()] = fd
        return block

    def send(self, tensors: list[Tensor], place: int, tag: int) -> _PendingSend:
        """Send the block ``tensors[0]``, from :meth:`memory`.

        Raises:
            RuntimeError: the peer has closed its end.
        """
        block = tensors[0]
        address, size = block.data_ptr(), block.numel()
        if size <= self.small:
            self.put([_bytes_of(block)], size)
            return _PendingSend(self, 0)
        # The descriptor travels with the first message in its block; later ones name the block by number.
        fd = self._unsent.pop(address, None)
        if size != self._size:
            self._size = size
            self._known.clear()
        if fd is not None:
            self._known[address] = self._numbers
            self._numbers += 1
        try:
            self.put([_RECORD.pack(self._known[address], size, fd is not None)], _RECORD.size)
            if fd is not None:
                # After the record, with a byte of its own: the receiver reads the record in one piece, then asks for the descriptor.
                socket.send_fds(self._socket, [b"+"], [fd])
        except BlockingIOError:
            raise RuntimeError("timed out") from None
        except OSError as error:
            raise _closed_error(error) from error
        finally:
            if fd is not None:
                os.close(fd)
        self._sent += 1
        return _PendingSend(self, self._sent)

    def taken(self, wait: bool) -> int:
        """How many blocks the peer has copied out; with ``wait``, after at least one more."""
        try:
            # One byte per block; a single call collects all that have come.
            answer = self._socket.recv(256, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            if wait:
                raise RuntimeError("timed out") from None
            return self._taken
        except OSError as error:
            raise _closed_error(error) from error
        if not answer:
            raise _closed_error()
        self._taken += len(answer)
        return self._taken

    def recv(self, tensors: list[Tensor], place: int, tag: int) -> _PendingReceive:
        """The next message, which has the size of ``tensors[0]``, is written there by the ``wait`` of the result."""
        return _PendingReceive(self, tensors[0])

    def take(self, block: Tensor) -> None:
        """Wait for the next message and copy it.

        Raises:
            RuntimeError: none came in time, or the peer has closed its end.
        """
        if block.numel() <= self.small:
            self.get([_bytes_of(block)], block.numel())
            return
        record = ctypes.create_string_buffer(_RECORD.size)
        self.get([record], _RECORD.size)
        number, size, new = _RECORD.unpack(record)
        # Checked before anything is mapped, since number and size are the peer's word.
        if size != block.numel():
            raise RuntimeError(f"a message of {size} bytes came where one of {block.numel()} was awaited")
        if size != self._size:
            self._size = size
            self._theirs.clear()
        if new:
            self._theirs[number] = self._mapped(size)
        if number not in self._theirs:
            raise RuntimeError(f"a message came in block {number}, which is not known")
        # Copied out, not used in place: the stage keeps a message until its backward, and the peer could not reuse the block until then.
        block.copy_(self._theirs[number])
        with suppress(OSError):  # the peer may have ended: what it sent still counts
            self._socket.send(b".")

    def _mapped(self, size: int) -> Tensor:
        """The block whose descriptor comes next. Mapped once and kept: later messages in it cost one copy on either side."""
        fd = self._next_descriptor()
        try:
            return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)
        except (ValueError, OSError) as error:
            raise RuntimeError(f"the memory of a message cannot be mapped ({error})") from error
        finally:
            os.close(fd)

    def _next_descriptor(self) -> int:
        while not self._descriptors:
            if self._next_byte() != b"." and not self._descriptors:  # which wakes an end that is awake already
                raise RuntimeError("a message came without its memory")
        return self._descriptors.popleft()

    def _next_byte(self) -> bytes:
        """Wait for a byte beside the ring, and keep the descriptor that may come with it; empty where the peer has closed its end."""
        try:
            byte, ancillary, _, _ = self._socket.recvmsg(1, _ANCILLARY)
        except BlockingIOError:
            raise RuntimeError("timed out") from None
        except ConnectionResetError:  # closed, with bytes of this end that it had not read
            return b""
        except OSError as error:
            raise _closed_error(error) from error
        for _, _, descriptor in ancillary:
            self._descriptors.append(_DESCRIPTOR.unpack(descriptor)[0])
        return byte

    # -- for both ------------------------------------------------------------------------------------------------------

    def wait_at_most(self, timeout: timedelta) -> None:
        """Set how long the next waits may take."""
        if timeout is not self._timeout:
            self._timeout = timeout
            seconds = timeout.total_seconds()
            whole = int(seconds)
            value = struct.pack("ll", whole, max(1, int((seconds - whole) * 1e6)))
            for what in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self._socket.setsockopt(socket.SOL_SOCKET, what, value)

    def interrupt(self) -> None:
        """End a wait of this process, from another thread, and all later ones; what was sent still arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        if self._ring is not None:
            self._ring.close()
        self._socket.close()
        for fd in (*self._unsent.values(), *self._descriptors):
            os.close(fd)
        self._unsent.clear()
        self._descriptors.clear()
        self._known.clear()
        self._theirs.clear()


class _PendingSend:
    """A message that lies ready for the peer; complete when the peer has copied it out."""

    __slots__ = ("_channel", "_number")

    def __init__(self, channel: UnixChannel, number: int) -> None:
        self._channel, self._number = channel, number

    def is_completed(self) -> bool:
        """Whether it is over; where the peer has gone as well, which :meth:`wait` tells."""
        try:
            return self._channel._taken >= self._number or self._channel.taken(wait=False) >= self._number
        except RuntimeError:
            return True

    def wait(self, timeout: timedelta) -> None:
        self._channel.wait_at_most(timeout)
        while self._channel._taken < self._number:
            self._channel.taken(wait=True)


class _PendingReceive:
    """A message that is still to come."""

    __slots__ = ("_block", "_channel")

    def __init__(self, channel: UnixChannel, block: Tensor) -> None:
        self._channel, self._block = channel, block

    def wait(self, timeout: timedelta) -> None:
        self._channel.wait_at_most(timeout)
        self._channel.take(self._block)


UnixChannels = dict[tuple[int, int], UnixChannel]
"""(direction, boundary) -> channel; boundary k lies between stages k and k + 1."""


def connect_neighbours(
    store: Store, k: int, depth: int, wanted: bool, timeout: timedelta, windows: Sequence[int] = ()
) -> UnixChannels:
    """The channels of stage ``k`` to those neighbours that are on this machine and want them, too. All stages call this.

    ``windows``: of each boundary, the messages that may come before they are wanted; by default one.

    No two stages wait for each other: every stage first publishes where it listens for the one before it, then calls the one after
    it, then answers.

    Raises:
        StageFailure: a neighbour did not come within the time-out.
    """
    found: UnixChannels = {}
    listener = _listen_for_neighbour(store, k - 1, wanted) if k > 0 else None
    try:
        if k < depth - 1:
            found |= _call_neighbour(store, k, wanted, timeout, windows[k] if windows else 1)
        if k > 0:
            found |= _answer_neighbour(store, k - 1, listener, timeout, windows[k - 1] if windows else 1)
    finally:
        if listener is not None:
            listener[0].close()
    return found


def _listen_for_neighbour(store: Store, boundary: int, wanted: bool) -> tuple[socket.socket, bytes] | None:
    listener = None
    if wanted and sys.platform == "linux":
        with suppress(OSError):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            name = f"pipeoptim-{os.getpid()}-{boundary}-{secrets.token_hex(8)}"
            listener.bind("\0" + name)  # abstract: in no folder, and gone with the process
            listener.listen(_CALLERS)
    if listener is None or not listener.getsockname():
        store.set(f"local/{boundary}", "-")
        return None
    token = secrets.token_bytes(_TOKEN)
    store.set(f"local/{boundary}", f"{name}{token.hex()}")
    return listener, token


def _call_neighbour(store: Store, boundary: int, wanted: bool, timeout: timedelta, window: int) -> UnixChannels:
    published = _read_key(store, f"local/{boundary}", boundary + 1, timeout)
    found: UnixChannels = {}
    if wanted and published != "-":
        name, token = published[: -2 * _TOKEN], bytes.fromhex(published[-2 * _TOKEN :])
        with suppress(OSError):
            # One connection for each direction: a full socket of activations never holds up gradients.
            for direction in (0, 1):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(timeout.total_seconds())  # strangers can fill the queue of those who call
                connection.connect("\0" + name)
                connection.settimeout(None)
                if not is_same_user(connection):
                    connection.close()
                    break
                found[direction, boundary] = UnixChannel(
                    connection, window, _offer_ring(connection, token + bytes([direction]))
                )
    if len(found) < 2:
        for channel in found.values():
            channel.close()
        found.clear()
    # The other end waits for this word before it accepts: it must not wait for a caller that never comes.
    store.set(f"local/{boundary}/called", "yes" if found else "no")
    return found


def _answer_neighbour(
    store: Store, boundary: int, listener: tuple[socket.socket, bytes] | None, timeout: timedelta, window: int
) -> UnixChannels:
    if _read_key(store, f"local/{boundary}/called", boundary, timeout) == "no" or listener is None:
        return {}
    found: UnixChannels = {}
    listener[0].settimeout(timeout.total_seconds())
    while len(found) < 2:
        connection, _ = listener[0].accept()
        connection.settimeout(1.0)  # a caller speaks at once
        with suppress(OSError):
            greeting, descriptors, flags = b"", list[int](), 0
            greeting, descriptors, flags, _ = socket.recv_fds(connection, _TOKEN + 1, 1)
        connection.settimeout(None)
        known = len(greeting) > _TOKEN and secrets.compare_digest(greeting[:_TOKEN], listener[1])  # in constant time
        try:
            if known and is_same_user(connection):
                if flags & socket.MSG_CTRUNC:  # the other end has a ring, and would put into it what this one never finds
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                ring = SharedRing(descriptors[0]) if descriptors else None
                found[greeting[_TOKEN], boundary] = UnixChannel(connection, window, ring)
            else:
                connection.close()
        finally:
            for fd in descriptors:
                os.close(fd)
    return found


def _offer_ring(connection: socket.socket, greeting: bytes) -> SharedRing | None:
    """Greet the other end, and give it the memory of a ring, which is returned; None where this machine has none."""
    try:
        fd = make_ring_memory(_BUFFER)
    except OSError:
        connection.sendall(greeting)
        return None
    try:
        socket.send_fds(connection, [greeting], [fd])
        return SharedRing(fd)
    finally:
        os.close(fd)


def _read_key(store: Store, key: str, peer: int, timeout: timedelta) -> str:
    try:
        store.wait([key], timeout)
    except RuntimeError as error:
        raise StageFailure(f"stage {peer} did not come within {timeout.total_seconds():g} s to be connected") from error
    return store.get(key).decode()
