"""Connections to the store that a fork has inherited from its parent: replaced by connections of its own, in place.

Client objects of the store are held in many places (the default process group, prefixes, clones), in C++. What they have in common is a
descriptor. A fork's descriptor leads to its parent's connection, and the answers of two processes would be mixed::

    client (C++) --> descriptor 13 --x  the parent's connection
                          '-----------> a new connection, made by a new client and put under the same number
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]


def renew_store_connections(host: str, port: int) -> None:
    """Give every client of the store at ``host`` and ``port`` in this process a connection of its own."""
    inherited = _connections_to(port)
    for descriptor in inherited:
        made = TCPStore(host, port, None, False, timedelta(seconds=300), False)
        (own,) = _connections_to(port) - inherited
        os.dup2(own, descriptor, inheritable=False)
        del made  # closes its own descriptor; the connection stays, under the other one


def _connections_to(port: int) -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself; a socket that is not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getpeername()[1] == port:
                        found.add(int(name))
    return found
