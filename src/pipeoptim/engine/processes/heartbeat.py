"""Liveness: a heartbeat of every process, and a call when one of them stops answering or has failed.

A wait for a dead neighbour usually ends by itself, when the connection closes. The heartbeat covers the rest: stages that are not
neighbours, machines that vanish without closing anything, NCCL, which waits for ever, and the first cause, which would otherwise
be lost when failures spread from neighbour to neighbour::

    every process k:    beat/k = 1, 2, 3, ...    ->  store  ->   every other: does beat/k still change?
    the first to fail:  failure = "stage 2 ..."  ->  store  ->   every other: on_dead("first failure: stage 2 ...")

One thread talks to the store, which may hang when the process that holds it is stopped; another judges what the first has heard.
Silence is measured in looks of this second thread, not on a clock: while this process or the store's was stopped nobody could have
been heard, so that a look that comes late counts as two intervals at most.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch.distributed.distributed_c10d import Store

_ENDED = ("gone", "failed")  # beats that do not change any more
_LINGER = 2.0  # seconds at least in which the others can read the first failure before the store's process may end


@dataclass
class _Peer:
    """What is known of another stage: its last beat, and for how many seconds of looking it has not changed.

    A stage that has ended owes no beats, but no stage should wait for it either: ``waited`` is when this one's present wait for it
    began, None where it does not wait.
    """

    key: str
    heard: str = ""  # written by the thread that talks to the store
    beat: str = ""
    waited: float | None = None
    silence: float = 0.0

    def look(self, waited: float | None, elapsed: float) -> None:
        """``elapsed`` seconds after the last look."""
        # An ended stage counts as silent for as long as one and the same wait for it goes on.
        silent = waited is not None and waited == self.waited if self.heard in _ENDED else self.heard == self.beat
        self.silence = self.silence + elapsed if silent else 0.0
        self.beat, self.waited = self.heard, waited


class Heartbeat:
    """Beats for stage ``k`` and listens for the others.

    Args:
        store: shared key-value store of the pipeline's processes, through a connection of its own.
        k, depth: this stage, of how many.
        timeout: seconds without a beat after which a stage counts as dead.
        name: how messages call number ``k``.
        holder: the number of the stage whose process holds the store; None where another does, such as torchrun's agent.
        on_dead: called once, from a thread of the heartbeat, when a stage is dead or has recorded a failure. It must end the waits of
            the main thread, which then raises what :meth:`cause` returns.

    Attributes:
        failure: the first failure of any stage, as soon as this one knows of it.
    """

    def __init__(
        self,
        store: Store,
        k: int,
        depth: int,
        timeout: float,
        name: str = "stage {}",
        holder: int | None = 0,
        *,
        on_dead: Callable[[str], None],
    ) -> None:
        self.store, self.k, self.timeout, self.name, self.holder, self.on_dead = store, k, timeout, name, holder, on_dead
        self.failure: str | None = None
        self.waiting_for: int | None = None
        self.waiting_since = 0.0
        # Twenty beats or more in a time-out of a second or more: a late one means nothing. At most 20 a second: one store serves all.
        self.interval = max(0.05, min(0.5, timeout / 20))
        self._peers = {j: _Peer(f"beat/{j}") for j in range(depth) if j != k}
        self._rounds = self._judged = 0  # times that all beats were read, and up to which of them they were judged
        self._unjudged = self._store_silence = 0.0  # seconds of looking since the last round
        self._store_lost = False
        self._to_record: str | None = None
        # _stop ends both threads, _wake cuts the pause between beats short, _known says that the first failure is known.
        self._stop, self._wake, self._known = threading.Event(), threading.Event(), threading.Event()
        self._talker, self._judge = (
            threading.Thread(target=run, name=f"pipeoptim-{what}-{k}", daemon=True)
            for run, what in ((self._talk, "heartbeat"), (self._watch, "watch"))
        )
        self._talker.start()
        self._judge.start()
        # A script that ends without close() must say "gone", or the others would wait for its beats until the time-out.
        atexit.register(self.close)

    def note_wait(self, peer: int | None) -> None:
        """Note that this stage begins (or, with None, ends) to wait for ``peer``."""
        self.waiting_for, self.waiting_since = peer, time.monotonic()

    def cause(self, own: str) -> str:
        """Why the pipeline failed: the failure that was recorded first, which is ``own`` where no stage came earlier."""
        first = self._first_failure(own) or f"{own}; {self._store_holder} does not answer: look there first"
        self._linger()
        return first

    def close(self) -> None:
        """Stop beating; the others no longer wait for this stage."""
        if not self._stop.is_set():
            self._stop.set()
            self._wake.set()
            atexit.unregister(self.close)
            for thread in (self._talker, self._judge):
                if threading.current_thread() is not thread:
                    thread.join(timeout=1.0)  # unless the store hangs it ends at once

    def _first_failure(self, own: str) -> str | None:
        """What the store holds, ``own`` if that is the first; None where the store does not answer."""
        self._to_record = own
        self._wake.set()
        # Bounded: a process that has failed must end, also where the store hangs.
        self._known.wait(0.0 if self._store_lost else max(_LINGER, 4 * self.interval))
        return self.failure

    # -- the thread that talks to the store ----------------------------------------------------------------------------

    def _talk(self) -> None:
        count = 0
        while not self._stop.is_set():
            try:
                # After a failure no number any more, so that the others do not take the silence to come for another failure.
                self.store.set(f"beat/{self.k}", str(count) if self.failure is None else "failed")
                self._hear()
                self._rounds += 1
            except RuntimeError:  # its process is gone, and no store connects again
                self._store_lost = True
                return
            count += 1
            self._wake.wait(self.interval)
            self._wake.clear()
        with suppress(RuntimeError):
            self.store.set(f"beat/{self.k}", "gone")

    def _hear(self) -> None:
        for peer in self._peers.values():
            # check() before get(), which would wait for a key of a process that has not come yet.
            if self.store.check([peer.key]):
                peer.heard = self.store.get(peer.key).decode()
        own = self._to_record
        if self.failure is None and (own is not None or self.store.check(["failure"])):
            # "" stands for a missing key, so that of several stages that fail at once one is the first for all
            first = self.store.compare_set("failure", "", own).decode() if own else self.store.get("failure").decode()
            self.failure = own if first == own else f"first failure: {first}"
            self._known.set()
            self._wake.set()

    # -- the thread that judges ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self.interval):
            now = time.monotonic()
            elapsed, looked = min(now - looked, 2 * self.interval), now
            store, peer = self._judge_store(elapsed), self._judge_peers(elapsed)
            if self.failure is None:
                # Nothing can be recorded in a store that is silent; and what this process has seen for itself stands without one.
                found = store or (peer and (self._first_failure(peer) or peer))
                self.failure = found or self.failure  # which the other thread may have heard of meanwhile
            if self.failure is not None and not self._stop.is_set():
                self.on_dead(self.failure)
                return

    def _judge_store(self, elapsed: float) -> str | None:
        """A store that hangs proves nothing where the launcher holds it, since stages go on without; one that is gone does."""
        self._store_silence = self._store_silence + elapsed if self._rounds == self._judged else 0.0
        if self._store_silence > self.timeout and (self._store_lost or self.holder is not None):
            return self._silent(self._store_holder)
        return None

    def _judge_peers(self, elapsed: float) -> str | None:
        self._unjudged = min(self._unjudged + elapsed, 2 * self.interval)
        if self._rounds == self._judged:
            return None
        elapsed, self._unjudged, self._judged = self._unjudged, 0.0, self._rounds
        for j, peer in self._peers.items():
            peer.look(self.waiting_since if self.waiting_for == j else None, elapsed)
            if peer.silence > self.timeout:
                return self._silent(self.name.format(j) + (", which has ended," if peer.heard in _ENDED else ""))
        return None

    @property
    def _store_holder(self) -> str:
        if self.holder is None:
            return "the process that holds the store"
        return f"{self.name.format(self.holder)}, whose process holds the store,"

    def _silent(self, who: str) -> str:
        return f"{who} gave no sign of life for {self.timeout:g} s"

    def _linger(self) -> None:
        """Let the others read the failure before this process, which may hold the store, ends: they would blame it instead."""
        end = time.monotonic() + max(_LINGER, 4 * self.interval)
        while self.holder == self.k and time.monotonic() < end and not self._stop.is_set():
            if all(peer.heard in _ENDED or peer.silence > self.timeout / 2 for peer in self._peers.values()):
                return
            time.sleep(self.interval / 4)
