"""In place of a device's side streams: copies on the CPU that happen as late, or as early, as the waits between them allow.

What a stage computes happens at once here, as everywhere on a CPU. Copies go into queues. One is carried out when something waits for
it, or earlier by chance; until then its destination holds noise (NaN) or what was there before. Memory "on the device" is handed out while
its former owner still writes into it, in the order of what is computed, as an allocator does that reuses memory in that order.
"""

import random
import threading
import time

import torch

NOISE = 255  # NaN in every floating-point type
WAITS = ("filled", "copied out", "free", "copied in", "read")
"""What is waited for: tensors are in the copy on the device; the copy is in pinned memory; its former owner has done with a block on the
device; a message is on the device; pinned memory has been read."""


class Queue:
    """One stream."""

    def __init__(self):
        self.steps, self.done = [], 0

    def add(self, step):
        self.steps.append(step)

    def run(self, until):
        while self.done < until:
            step, self.steps[self.done] = self.steps[self.done], None
            self.done += 1
            step()


class Event:
    """What was in ``queue`` when it was made. ``over`` when the program has seen that all of it is done."""

    def __init__(self, queue, place, streams=None, ignored=False):
        self.queue, self.place, self.streams, self.ignored, self.over = queue, place, streams, ignored, False

    def synchronize(self):
        if not self.ignored:
            with self.streams.lock:
                self.queue.run(self.place)
                self.over = True

    def query(self):
        with self.streams.lock:
            if not self.over and not self.ignored and self.streams.chance(0.3):
                self.synchronize()  # time has passed
            return self.over or self.ignored


class LateStreams:
    """As ``SideStreams``. ``forgotten``: one of ``WAITS``, which is left out."""

    def __init__(self, seed, forgotten=None):
        self.lock, self.random, self.forgotten = threading.RLock(), random.Random(seed), forgotten
        self.computing, self.out, self.into = Queue(), Queue(), Queue()
        self.unread = []  # what copies in must still find in pinned memory

    def chance(self, share):
        return self.random.random() < share

    def pinned(self, size):
        return torch.full((size,), NOISE, dtype=torch.uint8)

    def empty(self, size):
        block = torch.full((size,), NOISE, dtype=torch.uint8)
        with self.lock:
            self.computing.add(lambda: block.fill_(NOISE))
        return block

    def fill(self, places, tensors):
        now = [None if place is None else tensor.detach().clone() for place, tensor in zip(places, tensors, strict=True)]

        def write():
            for place, tensor in zip(places, now, strict=True):
                if place is not None:
                    place.copy_(tensor)

        with self.lock:
            self.computing.add(write)
            self._pass_time()

    def now(self):
        return Event(self.computing, len(self.computing.steps), self)

    def copy_out(self, host, block, after):
        return self._copy(self.out, host, block, after, "filled", "copied out")

    def copy_in(self, block, host, after):
        event = self._copy(self.into, block, host, after, "free", "read")
        self.unread = [(e, memory, was) for e, memory, was in self.unread if not e.over]
        self.unread.append((event, host, host.clone()))
        return event

    def _copy(self, queue, to, source, after, before, told):
        with self.lock:
            if self.forgotten != before:
                queue.add(after.synchronize)
            queue.add(lambda: to.copy_(source))
            self._pass_time()
            return Event(queue, len(queue.steps), self, ignored=self.forgotten == told)

    def compute_after(self, event):
        with self.lock:
            if self.forgotten != "copied in":
                event.queue.run(event.place)
            self.computing.run(len(self.computing.steps))  # what comes next is computed at once, so all before it is done

    def check(self):
        """Pinned memory that the device may still have to read is as it was. A copy that computing waited for is early here."""
        for event, memory, was in self.unread:
            assert event.over or torch.equal(memory, was), "pinned memory was used again too early"

    def _pass_time(self):
        for queue in (self.computing, self.out, self.into):
            if self.chance(0.2):
                queue.run(len(queue.steps))


def until(true, what, seconds=20.0):
    """Poll, with a time-out."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.0005)
