"""The connection between the commands of two nodes: JSON objects, one per line; nothing is unpickled, and nobody waits to be heard."""

from __future__ import annotations

import json
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pipeoptim.errors import PipeOptimError, StageFailure, first_line
from pipeoptim.files import cause_of
from pipeoptim.train.signals import AbortedError

BEAT = 1.0
"""Seconds between two signs of life."""

_MOST = 1 << 20  # bytes of a line, and of what has come and is not whole
_SILENCE = 25  # seconds after which a machine that acknowledges nothing, because it has lost its power, counts as gone
_PROBES = 3
_SEND = 5  # seconds after which the other end, which takes nothing, counts as gone


class NodeLink:
    """One end.

    Args:
        connection: to the other command.

    Attributes:
        ended: whether the other end has closed, or cannot be reached.
        heard: when something came last, by a monotonic clock.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(None)  # with a time-out, Python would wait before it reads
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that has lost its power closes nothing
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _SILENCE - 5 * _PROBES)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        # Nothing is probed while something sent is on its way, as signs of life are: TCP would send it again for a quarter of an hour.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE)
        self._rest = b""
        self.ended = False
        self.heard = time.monotonic()
        self._beaten = 0.0

    @property
    def peer(self) -> str:
        """IP address of the other end; empty where it is gone."""
        try:
            return str(self._connection.getpeername()[0])
        except OSError:
            return ""

    def send(self, **what: Any) -> None:
        """Send an object. Where the other end is gone, :attr:`ended` says so."""
        try:
            self._connection.sendall(json.dumps(what).encode() + b"\n")
        except OSError:
            self.ended = True

    def beat(self) -> None:
        """A sign of life, once per :data:`BEAT`."""
        if time.monotonic() - self._beaten > BEAT:
            self._beaten = time.monotonic()
            self.send(beat=1)

    def receive(self) -> list[dict[str, Any]]:
        """The objects that have come since. Anything else than objects ends the connection."""
        while not self.ended:
            try:
                data = self._connection.recv(_MOST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            self.heard = time.monotonic() if data else self.heard
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        found = []
        with suppress(ValueError, RecursionError):
            found += [what for what in map(json.loads, lines) if isinstance(what, dict)]
        if len(found) < len(lines) or len(self._rest) > _MOST:
            self.close()
        return found

    def close(self) -> None:
        """Let go of it."""
        self.ended = True
        self._connection.close()


def told(error: BaseException) -> dict[str, Any]:
    """An error, as it is told to another node."""
    if isinstance(error, KeyboardInterrupt):
        error = AbortedError("aborted by Ctrl-C", signal.SIGINT)
    number = error.number if isinstance(error, AbortedError) else 0
    if isinstance(error, PipeOptimError) and error.args:
        text = str(error.args[0])  # without what is added where it is shown
    else:
        text = cause_of(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
    return {"kind": type(error).__name__, "text": text, "number": number}


def as_error(what: object) -> PipeOptimError:
    """The error that another node has told."""
    what = what if isinstance(what, dict) else {}
    kind, text = str(what.get("kind")), str(what.get("text"))
    if kind == AbortedError.__name__:
        return AbortedError(text, int(what.get("number", 2)))
    known = {one.__name__: one for one in _with_subclasses(PipeOptimError)}
    return known.get(kind, StageFailure)(text)


def _with_subclasses(kind: type[PipeOptimError]) -> Iterator[type[PipeOptimError]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _with_subclasses(one)
