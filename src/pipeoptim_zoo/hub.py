"""The Hugging Face hub is asked only where it answers: without a network its clients try again and again, for minutes."""

from __future__ import annotations

import importlib
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pipeoptim.errors import ConfigError

__all__ = ["from_hub"]

SECONDS = 3.0
"""How long the hub, or the proxy on the way, may take to accept a connection."""


@contextmanager
def from_hub(what: str, name: str | Path) -> Iterator[None]:
    """Around what loads ``name``, which may be a name on the hub: where that does not answer, its cache alone is asked.

    Raises:
        ConfigError: it does not answer, and ``name`` is neither here nor in the cache.
    """
    reason = None if Path(name).expanduser().exists() else _silence()
    if reason is None:
        yield
        return
    with _offline():
        try:
            yield
        except Exception as error:  # the hub's, the network's and the file system's errors have no common base
            raise ConfigError(
                f"{what} {str(name)!r} is neither here nor in the cache of the Hugging Face hub, which cannot be asked: {reason}; name a "
                "local file or folder, or load it once where there is a network (HTTPS_PROXY names a proxy)"
            ) from error


def _silence() -> str | None:
    """Why the hub cannot be asked; None where it can."""
    constants = importlib.import_module("huggingface_hub.constants")
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = urlsplit(constants.ENDPOINT)
    proxy = None if proxy_bypass(hub.hostname or "") else getproxies().get(hub.scheme)
    server = urlsplit(proxy or constants.ENDPOINT)
    port = server.port or {"http": 80}.get(server.scheme, 443)
    said = [f"no answer within {SECONDS:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((server.hostname or "", port), timeout=SECONDS).close()
            said.append("")
        except OSError as error:
            said.append(error.strerror or str(error))

    thread = Thread(target=connect, daemon=True)  # finding its address has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    place = f"{'the proxy ' if proxy else ''}{server.hostname}:{port}"
    return f"no connection to {place} ({said[-1]})" if said[-1] else None


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does when the packages are imported, for as long as this lasts."""
    names = [name for name in ("huggingface_hub.constants", "datasets.config") if name in sys.modules]
    before = {name: vars(sys.modules[name])["HF_HUB_OFFLINE"] for name in names}
    for name in names:
        vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for name in names:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = before[name]
