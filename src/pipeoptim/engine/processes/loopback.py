"""A store that listens at one address: that of the loopback interface, unless other machines shall reach it.

torch's own ``TCPStore`` listens on all interfaces, whatever host name it is given, and asks nobody who calls for a password.
"""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

ADDRESS = "127.0.0.1"


def loopback_store(timeout: float = 300.0) -> TCPStore:
    """A store that this process serves to others of this machine, on a port that the system chooses.

    Args:
        timeout: seconds that its operations wait for what is not there yet.

    Example:
        >>> store = loopback_store()
        >>> store.set("loss", "0.5")
        >>> store.host, store.get("loss")
        ('127.0.0.1', b'0.5')
    """
    return served_store(ADDRESS, timeout)


def loopback_environment(store: TCPStore) -> dict[str, str]:
    """Variables with which ``init_process_group("gloo")`` in another process of this machine uses ``store``.

    The other process is a client of the store, whatever its rank. Its gloo listens on the loopback interface, unless the user has
    chosen one by GLOO_SOCKET_IFNAME.
    """
    return {**store_environment(ADDRESS, store.port), **gloo_on_loopback()}


def served_store(address: str, timeout: float = 300.0) -> TCPStore:
    """A store that this process serves at ``address``, one of its machine, and at no other."""
    # Port 0: the system chooses a free one, and it is ours from this line on, with no gap for another process to take it.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family, backlog=128)
    port = listener.getsockname()[1]
    # Detached: from now on the store owns the descriptor, and closes it.
    return TCPStore(address, port, None, True, timedelta(seconds=timeout), False, master_listen_fd=listener.detach())


def store_environment(address: str, port: int) -> dict[str, str]:
    """Variables with which another process is a client of the store there, whatever its rank."""
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}


def gloo_on_loopback() -> dict[str, str]:
    """The variable that keeps gloo's connections on this machine; empty where the user has set it, or the interface's name is unknown."""
    if sys.platform != "linux" or "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    return {"GLOO_SOCKET_IFNAME": "lo"}
