"""Starts the processes of the stages and replaces those that die by their images; with ``survive``, in place of torch's elastic agent.

::

    place of stage k:   process   works                               dies by a signal, or is stopped for long and then killed
                        image     sleeps   -- "take over as g + 1" ->  becomes the process, and leaves an image of its own

A process that ends by an exception would end so again: then the run ends, with its sentence, as without a supervisor. What images are, and
what they say, is in :mod:`pipeoptim.engine.processes.standby`.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeoptim.engine.processes.standby import CAUGHT_UP, CONTROL, IMAGE, LOST, READY, STANDS, TAKE_OVER
from pipeoptim.train.process_state import process_state
from pipeoptim.train.signals import StopSignals

_LOOK = 0.1  # seconds between looks for stopped processes and for signals
_LAST_WORDS = (
    2.0  # seconds for the end of a process that took over from one that had nothing left to do, once another has ended well
)
_LONGEST_LOOK = 1.0  # seconds that count between two of them
_SAME_PLACE = 10  # times that a place is taken over from one image, and nothing is gained, before it is given up
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class ImageEnd:
    """The supervisor's end of an image's connection."""

    connection: socket.socket
    mini_batch: int
    process: int = 0  # 0: not ready yet


@dataclass
class Replacement:
    """A process took the place of ``stage``'s, which had ended at ``died`` (seconds since the epoch) for this ``cause``.

    Attributes:
        image: the mini-batch from which it went on.
        caught_up: the first mini-batch that the one before had not begun; None until it gets there.
        seconds: from the end of the one before until then.
    """

    stage: str
    cause: str
    died: float
    image: int
    caught_up: int | None = None
    seconds: float | None = None


@dataclass
class WorkerPlace:
    """Of one stage's process: who works there, and who would take over.

    Attributes:
        generation: how often somebody has.
        died: when the one before had ended, by a monotonic clock.
        ended: its exit code; None while it works.
        replaced: each time that somebody has, in order.
    """

    rank: int
    process: int
    control: socket.socket
    generation: int = 0
    died: float = 0.0
    images: list[ImageEnd] = field(default_factory=list)  # oldest first
    ended: int | None = None
    replaced: list[Replacement] = field(default_factory=list)
    told: int = 0  # the signal that was passed on; 0: none
    stopped: float = 0.0  # seconds for which it has been stopped
    descriptor: int = -1

    def take_process(self, process: int) -> None:
        """``process`` works here from now on."""
        self.process, self.stopped = process, 0.0
        self.descriptor = os.pidfd_open(process)


class Supervisor:
    """Of one launch. While entered, orphans (images whose process has died) become children of this process; at the end nobody is left.

    Args:
        names: of the processes, by rank, for what it says.
        listing: a file that always says which process works at each place, and lists the replacements.
        frozen_after: seconds after which a process that is stopped counts as dead.
    """

    def __init__(self, names: Sequence[str], listing: Path, frozen_after: float = 10.0) -> None:
        self._names, self._listing, self._frozen_after = names, listing, frozen_after
        self._places: list[WorkerPlace] = []
        self._selector = selectors.DefaultSelector()
        self._looked = time.monotonic()
        self._others_ended, self._written = False, 0.0  # when all was written; 0: not yet
        self._retired: list[int] = []  # images that have been told to end

    def __enter__(self) -> Supervisor:
        _collect_orphans(True)
        return self

    def start(
        self,
        command: Sequence[str],
        environments: Mapping[int, Mapping[str, str]],
        outputs: Mapping[int, str],
        errors: Mapping[int, str],
    ) -> None:
        """Start a process per rank; ``outputs``: file names, empty for this process's own."""
        for rank, environment in environments.items():
            own, theirs = socket.socketpair()
            with theirs, _opened(outputs[rank]) as out, _opened(errors[rank]) as err:
                started = subprocess.Popen(
                    [sys.executable, *command],
                    env={**os.environ, **environment, CONTROL: str(theirs.fileno())},
                    stdout=out,
                    stderr=err,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C in a terminal is for this process, which passes it on
                )
            own.setblocking(False)
            place = WorkerPlace(rank, started.pid, own)
            started.returncode = 0  # it is waited for by its number here, like the images
            place.take_process(started.pid)
            self._places.append(place)
            self._watch(place)
        self._write_listing()

    def run(self, stop: StopSignals, look: Callable[[], bool] = lambda: False) -> dict[int, int]:
        """Until all have ended, or one has for good. Returns the exit codes of those that failed: negative, by a signal.

        ``stop``: signals that are passed on to the processes. ``look``: called again and again; what it raises ends this.
        It says whether processes that are supervised elsewhere have ended well.
        """
        while any(place.ended is None for place in self._places) and not any(place.ended for place in self._places):
            for key, _ in self._selector.select(_LOOK):
                key.data[0](*key.data[1:])
            self._look_for_stopped()
            self._pass_on(stop.number)
            self._others_ended = look()
            self._end_late_replacements()
        return {place.rank: place.ended for place in self._places if place.ended}

    def __exit__(self, *raised: object) -> None:
        """End what is left, wait for it, and give everything back."""
        for place in self._places:
            self._end_images(place)
            if place.ended is None:
                with suppress(ProcessLookupError):
                    os.kill(place.process, signal.SIGKILL)
                place.ended = _wait_for(place.process)
                self._stop_watching(place)
        # The images of a process that has been killed are this one's children by now; those of others ended with their own parents.
        self._reap(last=True)
        self._selector.close()
        _collect_orphans(False)

    # -- events --------------------------------------------------------------------------------------------------------

    def _watch(self, place: WorkerPlace) -> None:
        self._selector.register(place.control, selectors.EVENT_READ, (self._hear, place))
        self._selector.register(place.descriptor, selectors.EVENT_READ, (self._process_ended, place))

    def _stop_watching(self, place: WorkerPlace) -> None:
        for what in (place.control, place.descriptor):
            with suppress(KeyError):
                self._selector.unregister(what)
        place.control.close()
        os.close(place.descriptor)

    def _hear(self, place: WorkerPlace) -> bool:
        """A process announces an image. Returns whether there was anything to hear."""
        fds: list[int] = []
        try:
            text, fds, _, _ = socket.recv_fds(place.control, IMAGE.size, 1)  # as long as what says that a process has caught up
            if len(text) == CAUGHT_UP.size and not fds:
                self._note_caught_up(place, CAUGHT_UP.unpack(text)[1])
                return True
            if len(text) == IMAGE.size and fds:
                image = ImageEnd(socket.socket(fileno=fds[0]), IMAGE.unpack(text)[1])
                place.images.append(image)
                self._selector.register(image.connection, selectors.EVENT_READ, (self._hear_image, place, image))
                return True
        except BlockingIOError:
            return False
        except OSError:  # closed, as where nothing comes: what follows is that the process has ended
            pass
        with suppress(KeyError):
            self._selector.unregister(place.control)
        return False

    def _hear_image(self, place: WorkerPlace, image: ImageEnd) -> None:
        """An image is ready: those before it are needed no more."""
        if image not in place.images:  # it was told to end by what happened at the same time
            return
        text = b""
        with suppress(OSError):
            text = image.connection.recv(READY.size, socket.MSG_DONTWAIT)
        if len(text) < READY.size:  # it has ended by itself, killed perhaps, or was never made
            self._end_image(place, image)
            with suppress(OSError):
                place.control.send(LOST)
            return
        image.process = READY.unpack(text)[1]
        while place.images[0] is not image:
            self._end_image(place, place.images[0])
        with suppress(OSError):
            place.control.send(STANDS)
        self._reap()

    def _process_ended(self, place: WorkerPlace) -> None:
        # What it has said before counts: perhaps a newer image than the one that is known.
        while self._hear(place):
            pass
        self._stop_watching(place)
        code = _wait_for(place.process)
        for pending in place.images[:]:
            if not pending.process:
                self._hear_image(place, pending)
        image = next((each for each in reversed(place.images) if each.process), None)
        done = self._all_is_written
        if code >= 0 or image is None or done or self._dies_here(place, image):
            self._end_images(place)
            place.ended = 0 if done and code < 0 else code
            return
        place.images.remove(image)
        self._end_images(place)
        self._wake(place, image, code)

    @property
    def _all_is_written(self) -> bool:
        """Nobody ends well before all have met at the end and written what they had to write."""
        return self._others_ended or any(place.ended == 0 for place in self._places)

    def _end_late_replacements(self) -> None:
        """Of processes that died after that meeting: they would wait for neighbours that have ended."""
        self._written = self._written or (time.monotonic() if self._all_is_written else 0.0)
        late = self._written and time.monotonic() - self._written > _LAST_WORDS
        for place in self._places if late else ():
            if place.ended is None and place.replaced and place.replaced[-1].caught_up is None:
                with suppress(ProcessLookupError):
                    os.kill(place.process, signal.SIGKILL)  # which its end takes for a good one

    def _dies_here(self, place: WorkerPlace, image: ImageEnd) -> bool:
        """Whether the processes of this place die again and again on their way from this image, and get no further: by what they do."""
        latest = place.replaced[-_SAME_PLACE:]
        reached = {one.caught_up for one in latest} - {None}
        return len(latest) == _SAME_PLACE and len(reached) < 2 and all(one.image == image.mini_batch for one in latest)

    def _wake(self, place: WorkerPlace, image: ImageEnd, code: int) -> None:
        frozen = place.stopped > self._frozen_after
        cause = "stood still and was killed" if frozen else f"was killed by {signal.Signals(-code).name}"
        name = self._names[place.rank]
        place.replaced.append(Replacement(name, cause, round(time.time(), 3), image.mini_batch))
        place.died = time.monotonic()
        place.generation += 1
        self._selector.unregister(image.connection)
        place.control = image.connection
        place.control.setblocking(False)
        place.take_process(image.process)
        with suppress(OSError):  # it may have died as well: its descriptor tells
            place.control.sendall(TAKE_OVER.pack(b"t", place.generation, place.told))
        self._watch(place)
        self._write_listing()
        print(
            f"{name} {cause}; process {image.process} goes on from mini-batch {image.mini_batch}",
            file=sys.stderr,
            flush=True,
        )

    def _note_caught_up(self, place: WorkerPlace, mini_batch: int) -> None:
        latest = place.replaced[-1]
        latest.caught_up, latest.seconds = mini_batch, time.monotonic() - place.died
        self._write_listing()

    def _write_listing(self) -> None:
        replaced = sorted((one for place in self._places for one in place.replaced), key=lambda one: one.died)
        listing = {
            "processes": {self._names[place.rank]: place.process for place in self._places},
            "replaced": [asdict(one) for one in replaced],
        }
        part = self._listing.with_name(self._listing.name + ".part")
        part.write_text(json.dumps(listing, indent=1) + "\n")
        part.replace(self._listing)

    # -- images that are needed no more --------------------------------------------------------------------------------

    def _end_images(self, place: WorkerPlace) -> None:
        while place.images:
            self._end_image(place, place.images[0])

    def _end_image(self, place: WorkerPlace, image: ImageEnd) -> None:
        place.images.remove(image)
        self._selector.unregister(image.connection)
        if (
            not image.process
        ):  # its number is needed to wait for its end; where it was never made, the connection has closed already
            image.connection.settimeout(1.0)
            with suppress(OSError):
                text = image.connection.recv(READY.size, socket.MSG_WAITALL)
                image.process = READY.unpack(text)[1] if len(text) == READY.size else 0
        image.connection.close()  # which ends it
        if image.process:
            self._retired.append(image.process)

    def _reap(self, last: bool = False) -> None:
        for process in self._retired[:]:
            try:
                ended = os.waitpid(process, os.WNOHANG)[0]
                if last and not ended:
                    os.kill(process, signal.SIGKILL)  # it may be stopped, and would not see that its connection has closed
                    ended = os.waitpid(process, 0)[0]
            except ChildProcessError:  # its own parent has waited for it, or will
                ended = process if last or not _exists(process) else 0
            if ended:
                self._retired.remove(process)

    # -- stopped processes, and signals ---------------------------------------------------------------

    def _look_for_stopped(self) -> None:
        now = time.monotonic()
        # At most so much: while this process was stopped itself, nobody was late.
        passed, self._looked = min(now - self._looked, _LONGEST_LOOK), now
        for place in self._places:
            # One that has stood still for longer was killed for that, and its end will tell.
            if place.ended is None and place.stopped <= self._frozen_after:
                stopped = process_state(place.process) in ("T", "t")
                place.stopped = place.stopped + passed if stopped else 0.0
                if place.stopped > self._frozen_after:
                    # Killed before another takes over: one that wakes up later can write nothing.
                    with suppress(ProcessLookupError):
                        os.kill(place.process, signal.SIGKILL)

    def _pass_on(self, number: int) -> None:
        """Each signal to each process once; not before it can be replaced, for only then its handlers are there."""
        for place in self._places if number else ():
            if place.images and place.ended is None and place.told != number:
                place.told = number
                with suppress(ProcessLookupError):
                    os.kill(place.process, number)


def _collect_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _wait_for(process: int) -> int:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:
        return -signal.SIGKILL


def _exists(process: int) -> bool:
    return process_state(process) not in ("", "Z")


@contextmanager
def _opened(name: str) -> Iterator[int | None]:
    """A file to write into; None, which is this process's own, where there is no name."""
    if not name:
        yield None
        return
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
