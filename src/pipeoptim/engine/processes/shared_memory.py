"""A page of memory on which the stages of one machine exchange one number per update: the norm of their gradients.

A collective runs through several threads per process, which costs more than a millisecond of processor time per update where processes
share few cores. A number written to memory costs next to nothing, and a stage that reads it after one mini-batch's delay does not wait.

Each stage writes only its own slots, in turn, and reads those of the others. A slot has two words: the bits of the number, and the same
bits exclusive-or a mark that only this turn has. The two match only if both have arrived, in whatever order the processor wrote them::

    slot of stage j, turn t:   [ bits(number) | bits(number) ^ mark(t) ]      t modulo the turns that fit on the page
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import StageFailure

Waiting = Callable[[int | None], None]
NO_PIDFDS: Mapping[int, int] = MappingProxyType({})
_LOOK = 0.05  # seconds between looks whether the stage that is waited for still lives
_MIX = 0x9E3779B97F4A7C15  # odd, so that its multiples below 2^64 differ


class SharedMemoryNorms:
    """Stage ``k``'s end of the page.

    Args:
        page: zeros at first; the same memory in all processes, of :meth:`size` bytes.
        k, depth: this stage of how many.
        timeout: seconds to wait for another stage.
        waiting: called with the stage that this one waits for, and with None when it no longer waits.
        processes: descriptors of the other stages' processes (pidfds); closed with the page.
        in_flight: micro-batches that stage 0 has in flight at most; depth, unless it is more.
    """

    def __init__(
        self,
        page: mmap.mmap,
        k: int,
        depth: int,
        timeout: float,
        waiting: Waiting,
        processes: Mapping[int, int] = NO_PIDFDS,
        in_flight: int = 0,
    ) -> None:
        self.k, self.depth, self.timeout, self.waiting = k, depth, timeout, waiting
        self._page, self._process_fds = page, processes
        self._words = memoryview(page).cast("Q")
        self._turns = kept_turns(max(depth, in_flight))
        self._interrupted = False
        self._while_waiting: Callable[[], None] | None = None

    @staticmethod
    def size(depth: int, in_flight: int = 0) -> int:
        """Bytes that the page must have."""
        return 8 * depth * (2 * kept_turns(max(depth, in_flight)) + 1)

    def send(self, turn: int, number: float) -> None:
        """Write the ``turn``-th number of this stage."""
        place, (bits,) = self._place(self.k, turn), struct.unpack("Q", struct.pack("d", number))
        self._words[place] = bits
        self._words[place + 1] = bits ^ _turn_mark(turn)

    def receive(self, turn: int) -> list[float]:
        """The ``turn``-th number of every stage; waits for those that are missing.

        Raises:
            StageFailure: a stage has ended without it, or did not write it within the time-out.
        """
        # All are read before any is waited for: usually all are there, and no wait is reported to the heartbeat.
        found = [self._read_number(j, turn) for j in range(self.depth)]
        return [self._wait_for_number(j, turn) if number is None else number for j, number in enumerate(found)]

    def keep_waiting_for_replaced(self, while_waiting: Callable[[], None]) -> None:
        """A process that ends is replaced by another, which writes the same numbers; ``while_waiting`` is called until then."""
        self._while_waiting = while_waiting

    def interrupt(self) -> None:
        """End a wait of this process, from another thread, and all later ones."""
        self._interrupted = True

    def close(self) -> None:
        """Mark this stage as closed, which ends the waits for it, and release the page."""
        # Before the page goes: the others keep their own mappings, and see it there.
        self._words[self._closed_word(self.k)] = 1
        self._words.release()
        self._page.close()
        for fd in self._process_fds.values():
            os.close(fd)

    def _place(self, j: int, turn: int) -> int:
        return 2 * (j * self._turns + turn % self._turns)

    def _closed_word(self, j: int) -> int:
        return 2 * self.depth * self._turns + j

    def _has_ended(self, j: int) -> bool:
        if self._while_waiting is not None:
            self._while_waiting()
            return False
        if self._words[self._closed_word(j)] or j not in self._process_fds:
            return bool(self._words[self._closed_word(j)])
        ends = select.poll()
        ends.register(self._process_fds[j], select.POLLIN)  # what a process's descriptor has to read is that it has ended
        return bool(ends.poll(0))

    def _read_number(self, j: int, turn: int) -> float | None:
        place = self._place(j, turn)
        bits, sealed = self._words[place], self._words[place + 1]
        if bits ^ sealed != _turn_mark(turn):
            return None
        (number,) = struct.unpack("d", struct.pack("Q", bits))
        return float(number)

    def _wait_for_number(self, j: int, turn: int) -> float:
        began = looked = time.monotonic()
        ended = False
        self.waiting(j)
        try:
            while (number := self._read_number(j, turn)) is None:
                now = time.monotonic()
                if self._interrupted:
                    raise StageFailure(f"the wait for the norm of stage {j} was interrupted")
                if ended:
                    raise StageFailure(f"stage {j} ended and did not send the norm of its gradients")
                if now - began > self.timeout:
                    raise StageFailure(f"stage {j} did not send the norm of its gradients within {self.timeout:g} s")
                if now - looked > _LOOK:
                    looked, ended = now, self._has_ended(j)  # it may have written before: read once more
                time.sleep(min(max((now - began) / 8, 2e-5), 1e-3))  # late by an eighth at most
        finally:
            self.waiting(None)
        return number


def kept_turns(in_flight: int) -> int:
    """Numbers of a stage that are kept: no stage is more than ``2 in_flight + 2`` updates ahead of what another still needs."""
    return 4 * (in_flight + 1)


def _turn_mark(turn: int) -> int:
    return (turn + 1) * _MIX & 0xFFFFFFFFFFFFFFFF


def shared_memory_norms(rendezvous: Rendezvous, wanted: bool, waiting: Waiting, in_flight: int = 0) -> SharedMemoryNorms | None:
    """A page that the processes of ``rendezvous`` share, one per stage; None in all of them where one cannot or does not want to.

    The first makes the memory, under a name that nobody can guess and that lies in no folder. The others find it in what the system
    shows of the first one's open files, and so know that they are on the same machine.

    Raises:
        StageFailure: a process did not come within the time-out.
    """
    k, depth = rendezvous.index, len(rendezvous.ranks)
    size = SharedMemoryNorms.size(depth, in_flight)
    # Before the first exchange, which tells the others its name; they may look for it at once.
    made = _make_memory(size) if wanted and k == 0 else None
    page, processes = None, dict[int, int]()
    try:
        told = [text.split() for text in rendezvous.all_gather("norms", f"{os.getpid()} {made or '- -'}", "to share memory")]
        if wanted:
            page = _find_memory(told[0], size)
            processes = _open_processes({j: int(pid) for j, (pid, *_) in enumerate(told) if j != k})
        ready = page is not None and len(processes) == depth - 1
        # A second exchange: all use the page or none does, and nobody closes the descriptor before all have mapped it.
        agreed = set(rendezvous.all_gather("norms/found", "yes" if ready else "no", "to share memory")) == {"yes"}
    finally:
        if made is not None:
            # The mappings keep the memory; without a descriptor no other process finds it by its name.
            os.close(int(made.split()[0]))
    if agreed and page is not None:
        return SharedMemoryNorms(page, k, depth, rendezvous.timeout.total_seconds(), waiting, processes, in_flight)
    for fd in processes.values():
        os.close(fd)
    return None


def _make_memory(size: int) -> str | None:
    """Make the memory; its descriptor and its name, None where that cannot be done."""
    if sys.platform == "linux":
        with suppress(OSError):
            name = f"pipeoptim-norms-{secrets.token_hex(16)}"
            fd = os.memfd_create(name)
            os.ftruncate(fd, size)
            return f"{fd} {name}"
    return None


def _find_memory(told: Sequence[str], size: int) -> mmap.mmap | None:
    """That memory, in this process; None where no process that it sees is the one that told this and has it."""
    pid, fd, name = told
    path = f"/proc/{pid}/fd/{fd}"
    with suppress(OSError):
        # The random name shows that this is the process that told it, not one of this machine with the same number.
        if os.readlink(path) == f"/memfd:{name} (deleted)":
            found = os.open(path, os.O_RDWR)
            try:
                return mmap.mmap(found, size) if os.fstat(found).st_uid == os.geteuid() else None
            finally:
                os.close(found)
    return None


def _open_processes(pids: Mapping[int, int]) -> dict[int, int]:
    """Their descriptors, of as many as can be had."""
    found = {}
    if sys.platform == "linux":
        for j, pid in pids.items():
            with suppress(OSError):
                # A descriptor, since a number may be given to another process after the first has ended.
                found[j] = os.pidfd_open(pid)
    return found
