"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # process, user and group of the other end, as the kernel knows them


def is_same_user(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user. Name and token prove little: anybody who can reach the store can read them."""
    _, user, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())
