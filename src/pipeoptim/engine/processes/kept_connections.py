"""How the processes of a pipeline whose stages can be replaced find each other, at first and again: by an address in the store.

::

    stage k + 1   listens; publishes generation, address and a secret          accepts a caller that knows the secret
    stage k       reads it, calls, says the secret and its own generation      refused if a later one of stage k has called before

A stage that takes over listens at a new address, and its neighbours, whose connections have broken, look for that.
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
_PAUSE = 0.005  # seconds between two looks into the store


class BoundaryListener:
    """Stage ``boundary + 1``, for calls of stage ``boundary``."""

    def __init__(self, store: Store, boundary: int, generation: int) -> None:
        self._caller = -1  # the latest generation that has called
        self._socket: socket.socket | None = None
        self.boundary = boundary
        self.listen(store, generation)

    def listen(self, store: Store, generation: int) -> None:
        """Be there for calls, at a new address."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"pipeoptim-kept-{os.getpid()}-{self.boundary}-{secrets.token_hex(8)}"
        self._socket.bind("\0" + name)
        self._socket.listen(16)
        self._secret = secrets.token_bytes(_SECRET)
        store.set(f"kept/{self.boundary}", f"{generation} {name} {self._secret.hex()}")

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
        if not is_same_user(connection):  # not even listened to
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
        self._caller = generation
        return True

    def close(self) -> None:
        """Stop listening."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def call(store: Store, boundary: int, generation: int, seconds: float) -> socket.socket:
    """A connection of stage ``boundary`` to stage ``boundary + 1``, which may be on its way.

    Raises:
        StageFailure: it did not come in time.
    """
    end, key = time.monotonic() + seconds, f"kept/{boundary}"
    while True:
        if store.check([key]):
            _, name, secret = store.get(key).decode().split()
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(max(0.001, end - time.monotonic()))  # strangers can fill the queue of those who call
            try:
                connection.connect("\0" + name)
                if is_same_user(connection):
                    connection.sendall(_CALL.pack(bytes.fromhex(secret), generation))
                    return connection
            except OSError:  # it has died; another one will publish its own address
                pass
            connection.close()
        if time.monotonic() > end:
            raise StageFailure(f"stage {boundary + 1} did not come within {seconds:g} s to be connected")
        time.sleep(_PAUSE)
