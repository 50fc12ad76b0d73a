"""One process trains in a run directory at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeoptim.errors import ConfigError
from pipeoptim.files import cause_of

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else trains in ``folder`` inside the block.

    Raises:
        ConfigError: somebody does, or nothing can be written there.
    """
    try:
        # Not "w": that would erase the holder's name before the lock is known to be free.
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(
            f"nothing can be written to run directory {folder} ({cause_of(error)}); make it writable, or copy it"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"run {folder} is in use by {holder}; wait until that has ended, or start another run with --new or --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
