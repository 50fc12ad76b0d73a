"""Is everybody still there? A heartbeat of every stage, and the end of this process when one stays away.

A wait for a dead neighbour usually ends by itself, when the connection closes. This watch covers the rest: stages that are not
neighbours, machines that vanish without closing anything, NCCL, which waits for ever, and the first cause, which would else
get lost when failures spread from neighbour to neighbour.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from contextlib import suppress

from torch.distributed.distributed_c10d import Store

_STORE_GONE = "the process that holds the store (stage 0, unless torchrun holds it)"
_GRACE = 1.0  # seconds that the main thread has to fail by itself, with its own traceback


class Heartbeat:
    """Beats for stage ``k`` and watches the others.

    Args:
        store: shared key-value store of the pipeline's processes.
        k, depth: this stage of how many.
        timeout: seconds without a beat after which a stage counts as dead.
        name: how messages call number ``k``.
    """

    def __init__(self, store: Store, k: int, depth: int, timeout: float, name: str = "stage {}") -> None:
        self.store, self.k, self.depth, self.timeout, self.name = store, k, depth, timeout, name
        self.waiting_for: int | None = None
        self.waiting_since = 0.0
        self._stop = threading.Event()
        self._last = {j: ("", time.monotonic()) for j in range(depth) if j != k}
        self._thread = threading.Thread(target=self._run, name=f"pipeoptim-watch-{k}", daemon=True)
        self._set("beat", "0")
        self._thread.start()
        atexit.register(self.close)

    def note_wait(self, peer: int | None) -> None:
        """Note that this stage begins (or, with None, ends) to wait for ``peer``."""
        self.waiting_for, self.waiting_since = peer, time.monotonic()

    def cause(self, own: str) -> str:
        """The first failure that any stage noted; ``own`` where this is the first, and then it is noted."""
        try:
            if self.store.check(["failure"]):
                first = self.store.get("failure").decode()
                return own if first == own else f"{own}; first failure: {first}"
            self.store.set("failure", own)
        except Exception:  # whatever a broken connection raises
            return f"{own}; {_STORE_GONE} is gone too: look there first"
        return own

    def close(self) -> None:
        """Stop beating; the others no longer wait for this stage."""
        if not self._stop.is_set():
            self._stop.set()
            self._set("beat", "gone")
            atexit.unregister(self.close)
            if threading.current_thread() is not self._thread:
                self._thread.join(timeout=1.0)  # unless the store hangs it ends at once

    def _run(self) -> None:
        count = 0
        interval = max(0.05, min(1.0, self.timeout / 5))
        lost_since: float | None = None
        while not self._stop.wait(interval):
            count += 1
            try:
                self.store.set(f"beat/{self.k}", str(count))
                dead = self._look()
                lost_since = None
            except Exception:  # the store's process is gone
                lost_since = lost_since or time.monotonic()
                dead = _STORE_GONE if self._since(lost_since) else None
            if dead is not None and not self._stop.is_set():
                self._end(dead)

    def _look(self) -> str | None:
        now = time.monotonic()
        for j, (seen, when) in self._last.items():
            key = f"beat/{j}"
            beat = self.store.get(key).decode() if self.store.check([key]) else ""
            if beat == "gone":
                if self.waiting_for == j and self._since(self.waiting_since):
                    return f"{self.name.format(j)}, which has ended,"
            elif beat != seen:
                self._last[j] = (beat, now)
            elif self._since(when):
                return self.name.format(j)
        return None

    def _since(self, when: float) -> bool:
        return time.monotonic() - when > self.timeout

    def _end(self, dead: str) -> None:
        message = self.cause(f"{dead} gave no sign of life for {self.timeout:g} s")
        if self._stop.wait(_GRACE):
            return
        print(f"pipeoptim: {self.name.format(self.k)} ends: {message}", file=sys.stderr, flush=True)
        os._exit(1)

    def _set(self, what: str, value: str) -> None:
        with suppress(Exception):
            self.store.set(f"{what}/{self.k}", value)
