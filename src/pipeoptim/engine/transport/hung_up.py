"""Whether a connection has ended, told without reading from it."""

import select
import socket


def has_hung_up(connection: socket.socket) -> bool:
    """Whether either end has ended ``connection``; bytes that still lie in it do not hide that, as they would from a read."""
    look = select.poll()
    look.register(connection, select.POLLRDHUP)
    return bool(look.poll(0))
