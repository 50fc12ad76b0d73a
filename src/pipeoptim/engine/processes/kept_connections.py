"""How the processes of a pipeline whose stages can be replaced find each other, at first and again: by an address in the store.

::

    stage k + 1   listens; publishes generation, address and a secret          accepts a caller that knows the secret
    stage k       reads it, calls, says the secret and its own generation      refused if a later one of stage k has called before

A stage that takes over listens at a new address, and its neighbours, whose connections have broken, look for that.

Between machines the address is one of TCP. There the kernel does not say whose process the other is; the listener answers a call with a
second secret, so that a program which has got a dead stage's port is not taken for the stage.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from contextlib import suppress

from torch.distributed.distributed_c10d import Store

from pipeoptim.engine.transport.same_user import is_same_user
from pipeoptim.errors import StageFailure

_SECRET = 16
_CALL = struct.Struct(f"<{_SECRET}sq")  # the secret, the caller's generation
_WAY = 2.0  # seconds that a connection to another machine may take at least, however short the look
_PROBES = 3  # unanswered, after which another machine counts as gone
_PAUSE = 0.005  # seconds between two looks into the store


class BoundaryListener:
    """Stage ``boundary + 1``, for calls of stage ``boundary``.

    Args:
        host: this machine's IP address, where stage ``boundary`` is on another one; empty where it is on this one.
        timeout: seconds without a sign of life after which a connection to another machine breaks.
    """

    def __init__(self, store: Store, boundary: int, generation: int, host: str = "", timeout: float = 60.0) -> None:
        self._caller = -1  # the latest generation that has called
        self._socket: socket.socket | None = None
        self.boundary = boundary
        self._host, self._timeout = host, timeout
        self.listen(store, generation)

    def listen(self, store: Store, generation: int) -> None:
        """Be there for calls, at a new address."""
        if self._host:
            self._socket = socket.socket(_family(self._host), socket.SOCK_STREAM)
            self._socket.bind((self._host, 0))
            name = f"{self._host} {self._socket.getsockname()[1]}"
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            name = f"pipeoptim-kept-{os.getpid()}-{self.boundary}-{secrets.token_hex(8)}"
            self._socket.bind("\0" + name)
        self._socket.listen(16)
        self._secret, self._answer = secrets.token_bytes(_SECRET), secrets.token_bytes(_SECRET)
        store.set(f"kept/{self.boundary}", f"{generation} {self._secret.hex()} {self._answer.hex()} {name}")

    def accept(self, seconds: float) -> socket.socket:
        """The next connection of stage ``boundary``.

        Raises:
            StageFailure: none came in time.
        """
        end = time.monotonic() + seconds
        while self._socket is not None:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                break
            if self._is_expected(connection):
                return connection
            connection.close()
        raise StageFailure(f"stage {self.boundary} did not come within {seconds:g} s to be connected")

    def _is_expected(self, connection: socket.socket) -> bool:
        if not self._host and not is_same_user(connection):  # not even listened to
            return False
        connection.settimeout(1.0)  # a caller speaks at once
        call = b""
        with suppress(OSError):
            call = connection.recv(_CALL.size, socket.MSG_WAITALL)
        if len(call) < _CALL.size:
            return False
        secret, generation = _CALL.unpack(call)
        # A process that was replaced, and does not know it, has nothing to say any more.
        if not secrets.compare_digest(secret, self._secret) or generation < self._caller:
            return False
        if self._host:
            try:
                _break_when_silent(connection, self._timeout)
                connection.sendall(self._answer)
            except OSError:  # it has died meanwhile
                return False
        self._caller = generation
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def call(store: Store, boundary: int, generation: int, seconds: float, timeout: float = 60.0) -> socket.socket:
    """A connection of stage ``boundary`` to stage ``boundary + 1``, which may be on its way.

    ``timeout``: seconds that a stage on another machine may take to answer, once it is connected, and without a sign of life after which
    the connection breaks.

    Raises:
        StageFailure: it did not come in time.
    """
    end, key = time.monotonic() + seconds, f"kept/{boundary}"
    while True:
        if store.check([key]):
            _, secret, answer, *name = store.get(key).decode().split()
            hello = _CALL.pack(bytes.fromhex(secret), generation)
            # Strangers can fill the queue of those who call.
            connection = _connected(name, hello, bytes.fromhex(answer), max(0.001, end - time.monotonic()), timeout)
            if connection is not None:
                return connection
        if time.monotonic() > end:
            raise StageFailure(f"stage {boundary + 1} did not come within {seconds:g} s to be connected")
        time.sleep(_PAUSE)


def _connected(name: list[str], hello: bytes, answer: bytes, seconds: float, timeout: float) -> socket.socket | None:
    """A connection to whoever listens at ``name``; None where that has died: another one will publish its own address."""
    apart = len(name) == 2  # host and port, on another machine
    connection = socket.socket(_family(name[0]) if apart else socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(max(seconds, _WAY) if apart else seconds)
    try:
        if apart:
            connection.connect((name[0], int(name[1])))
            _break_when_silent(connection, timeout)
            connection.sendall(hello)
            connection.settimeout(timeout)  # it answers when it looks, which it does not while it computes
            if secrets.compare_digest(connection.recv(_SECRET, socket.MSG_WAITALL), answer):
                return connection
        else:
            connection.connect("\0" + name[0])
            if is_same_user(connection):
                connection.sendall(hello)
                return connection
    except OSError:
        pass
    connection.close()
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _break_when_silent(connection: socket.socket, timeout: float) -> None:
    """A machine that has lost its power closes no connection: probe it, and give up after ``timeout`` seconds; send at once."""
    between = max(1, int(timeout / (_PROBES + 1)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, between)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1000, int(timeout * 1000)))
