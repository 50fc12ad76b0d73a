"""Connections that torch opens and never shows: gloo's and the store's, which another thread must be able to cut.

A process that waits in gloo for a stage that will never answer sits in C++ until its time-out: neither an exception nor a signal reaches
it, and ``ProcessGroupGloo.abort`` does nothing. What ends the wait is what ends it when the peer dies: the connection closes. So the
sockets that appear while a group is made are remembered, and shut down when a wait has to end.

Not those that a store in this process has accepted meanwhile, which are the connections of other processes to it::

    process 1: heartbeat  -- a port of the system's choice ---------> the store's port: process 0
    process 0: its own connection to the store has another local port, and is cut

Without them the others could not read what failed first, and would blame process 0.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

_Opened = set[tuple[int, int]]  # descriptor and inode: a descriptor is used again after a close, the pair is not


class OpenedSockets:
    """Remembers the sockets that this process opens inside its ``with`` blocks, by whatever library.

    ``served``: a port whose connections belong to other processes, if this one listens there.

    Example:
        >>> opened = OpenedSockets()
        >>> with opened:
        ...     ours, theirs = socket.socketpair()
        >>> opened.shut_down(families=(socket.AF_UNIX,))
        >>> ours.recv(1)
        b''
    """

    def __init__(self, served: int | None = None) -> None:
        self._served = served
        self._opened: _Opened = set()
        self._before: _Opened | None = None

    def __enter__(self) -> None:
        self._before = _open_sockets()

    def __exit__(self, *_: object) -> None:
        self._opened, self._before = self._all(), None

    def shut_down(self, families: tuple[int, ...] = (socket.AF_INET, socket.AF_INET6)) -> None:
        """End every connection among them, those of a block that has not ended yet included; waits on them fail at once."""
        for fd, inode in self._all():
            with suppress(OSError):  # closed meanwhile
                if os.fstat(fd).st_ino == inode:
                    with socket.socket(fileno=os.dup(fd)) as connection:  # a copy: the owner's descriptor stays its own
                        _shut_down(connection, families, self._served)

    def interrupt(self) -> None:
        """End the waits of this process on them, from another thread, and all later ones."""
        self.shut_down()

    def _all(self) -> _Opened:
        return self._opened if self._before is None else self._opened | (_open_sockets() - self._before)


def _shut_down(connection: socket.socket, families: tuple[int, ...], served: int | None) -> None:
    listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if connection.family not in families or listens:  # gloo ends the process when one that listens is shut down
        return
    if served is None or connection.family == socket.AF_UNIX or connection.getsockname()[1] != served:
        connection.shutdown(socket.SHUT_RDWR)


def _open_sockets() -> _Opened:
    found: _Opened = set()
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else ():
        with suppress(OSError, ValueError):  # the descriptor of the listing itself
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.add((int(name), status.st_ino))
    return found
