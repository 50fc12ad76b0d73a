"""What a thread looks at now and then while this process does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeatedly(look: Callable[[], None], seconds: float, name: str) -> Iterator[None]:
    """While inside, a thread of this ``name`` calls ``look`` every so many ``seconds``; it has ended afterwards."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=work, name=f"pipeoptim-{name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
