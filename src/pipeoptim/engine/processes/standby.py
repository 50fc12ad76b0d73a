"""An image of this process that takes its place when it dies: a fork that sleeps until the supervisor wakes it.

A fork has everything that its process had at that moment, graphs of micro-batches in flight, weights that they were computed with,
optimizer, random numbers and the script's own variables included, and costs no copy of what is not written afterwards::

    supervisor   <------------- control ---------------   process of stage k
        |                                                     | fork, every so many mini-batches
        |   <-- "ready" --------------------------------   image          (the one before it ends)
        |   ... the process dies, or is found frozen and is killed
        |   --- "take over as generation g" ----------->   image          goes on from there as stage k, after leaving an image of its own

What is ordered here is only who lives. How a stage catches up with its neighbours is in :mod:`~pipeoptim.engine.transport.kept_link`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

CONTROL = "PIPEOPTIM_CONTROL"
"""Environment variable with the descriptor of this process's connection to its supervisor."""

IMAGE = struct.Struct(
    "<cq"
)  # process to supervisor, with a descriptor: b"i" and the mini-batch; the other end speaks for the image
READY = struct.Struct("<cq")  # image to supervisor: b"r" and its process id
CAUGHT_UP = struct.Struct("<cq")  # process to supervisor: b"c" and the first mini-batch that it does not do again
STANDS = b"s"  # supervisor to process: the newest image is ready, and the one before has been told to end
LOST = b"l"  # supervisor to process: an image has ended, so that another one is wanted
TAKE_OVER = struct.Struct("<cqq")  # supervisor to image: b"t", the generation, and a signal that asks for a stop, or 0


_STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP


class Standby:
    """Of this process.

    Args:
        control: the connection to the supervisor.

    Attributes:
        generation: how often a process has taken this place.
        lost: whether an image has ended by itself, and there is no other.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self.generation, self.lost = 0, False
        self._images: list[int] = []
        self._awaited = False

    @classmethod
    def of_this_process(cls) -> Standby | None:
        """The one of a process that a supervisor started; None for others."""
        descriptor = os.environ.get(CONTROL)
        return None if descriptor is None else cls(socket.socket(fileno=int(descriptor)))

    def keep(self, mini_batch: int, in_image: Callable[[], None]) -> bool:
        """Leave an image of this moment. Returns True in a process that takes over, at this same moment.

        ``in_image``: called in the image at once; lets go of what must close when the process dies.
        """
        woken = False
        while True:
            own, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._control, [IMAGE.pack(b"i", mini_batch)], [theirs.fileno()])
            process = os.fork()
            if process:
                own.close()
                self._adopt(process)
                return woken
            self._control.close()
            self._control, self._images = own, []
            in_image()
            self._sleep()
            woken = True

    def stands(self, wait: bool) -> bool:
        """Whether the newest image has become the one that would take over, since this was last asked.

        ``wait``: until that is known, so that no image is older than two periods.
        """
        heard = b""
        with suppress(BlockingIOError):
            heard = self._control.recv(16, 0 if wait and self._awaited else socket.MSG_DONTWAIT)
        if heard:
            self._awaited, self.lost = False, heard.endswith(LOST)  # also of an image that had stood
        return STANDS in heard

    def tell_caught_up(self, mini_batch: int) -> None:
        """Tell the supervisor that from ``mini_batch`` on nothing is done again."""
        with suppress(OSError):  # it has ended, and this process will
            self._control.sendall(CAUGHT_UP.pack(b"c", mini_batch))

    def _adopt(self, process: int) -> None:
        self._awaited, self.lost = True, False
        self._reap()
        self._images.append(process)

    def _reap(self) -> None:
        """Images that have ended: no zombies."""
        for process in self._images[:]:
            with suppress(ChildProcessError):
                if os.waitpid(process, os.WNOHANG)[0]:
                    self._images.remove(process)

    def _sleep(self) -> None:
        """Until this image is woken; otherwise it ends here."""
        # What the terminal tells all processes is for those that work; the supervisor passes it on.
        heeded_signals = [number for number in _STOPS if callable(signal.getsignal(number))]
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in heeded_signals}
        order = b""
        with suppress(OSError):
            self._control.sendall(READY.pack(b"r", os.getpid()))
            order = self._control.recv(TAKE_OVER.size, socket.MSG_WAITALL)
        if len(order) < TAKE_OVER.size:
            os._exit(0)  # not by an exception: the script's own clean-up belongs to the process that works
        _, self.generation, number = TAKE_OVER.unpack(order)
        _end_with_supervisor()
        for heeded, handler in handlers.items():
            signal.signal(heeded, handler)
        if number:  # what the process that died had been told, perhaps after this image was made
            os.kill(os.getpid(), number)


def _end_with_supervisor() -> None:
    """The supervisor is this process's parent by now, since the one that made it has ended; a fork inherits no wish to end with it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
