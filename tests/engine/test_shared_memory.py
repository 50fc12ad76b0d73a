"""The page on which stages of one machine tell each other their norms: what arrives, what does not count, and who has ended."""

import math
import mmap
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest

from pipeoptim.engine.processes.shared_memory import SharedMemoryNorms, shared_memory_norms
from pipeoptim.errors import StageFailure


def boards(depth, timeout=20.0, processes=None):
    """The ends of all stages, on one page, and what each waited for."""
    page, waits = mmap.mmap(-1, SharedMemoryNorms.size(depth)), [[] for _ in range(depth)]
    return [SharedMemoryNorms(page, k, depth, timeout, waits[k].append, processes or {}) for k in range(depth)], waits


def test_every_stage_reads_what_all_have_written_in_every_turn():
    ends, waits = boards(3)
    values = [0.0, -0.0, 1 / 3, math.inf, -math.inf, 5e-324, 1.7e308]
    for turn in range(100):  # many times around the page
        told = [values[(turn + k) % 7] for k in range(3)]
        for end, value in zip(ends, told, strict=True):
            end.send(turn, value)
        for end in ends:
            assert list(map(repr, end.receive(turn))) == list(map(repr, told))
    for end in ends:
        end.send(100, math.nan)
    assert all(map(math.isnan, ends[0].receive(100)))
    assert waits == [[], [], []]


def test_a_stage_may_be_as_far_ahead_as_a_pipeline_lets_it():
    ends, _ = boards(4)
    for turn in range(2 * 4 + 3):
        for end in ends[1:]:
            end.send(turn, float(turn))
    for turn in range(2 * 4 + 3):
        ends[0].send(turn, -1.0)
        assert ends[0].receive(turn) == [-1.0, turn, turn, turn]


@pytest.mark.parametrize("arrived", [0, 1])
def test_half_of_a_number_counts_as_none_whichever_half_it_is(arrived):
    """Another processor may see two writes in either order: the new word with the old one beside it is no number."""
    (mine, theirs), waits = boards(2, timeout=0.05)
    words = theirs._words
    for turn in range(theirs._turns):
        theirs.send(turn, 2.0)
    place, turn = theirs._place(1, 3), 3 + theirs._turns
    old = words[place], words[place + 1]
    theirs.send(turn, 7.0)
    words[place + 1 - arrived] = old[1 - arrived]
    mine.send(turn, 1.0)
    with pytest.raises(StageFailure, match=r"stage 1 did not send the norm of its gradients within 0.05 s"):
        mine.receive(turn)
    assert waits[0] == [1, None]
    theirs.send(turn, 7.0)
    assert mine.receive(turn) == [1.0, 7.0]


def test_who_waits_gets_what_comes_later_and_hears_of_a_stage_that_has_closed():
    (mine, theirs), _ = boards(2)
    with ThreadPoolExecutor(1) as pool:
        for turn in range(2):
            mine.send(turn, 1.0)
        later = pool.submit(mine.receive, 0)
        theirs.send(0, 2.0)
        assert later.result(20) == [1.0, 2.0]
        missing = pool.submit(mine.receive, 1)
        theirs._words[theirs._closed_word(1)] = 1  # what close() writes; the page is one here, and stays open
        with pytest.raises(StageFailure, match="stage 1 ended and did not send"):
            missing.result(20)
    theirs.send(1, 3.0)
    assert mine.receive(1) == [1.0, 3.0], "what a stage has written before it closed can still be read"


def test_a_process_that_is_killed_ends_the_wait_within_seconds():
    child = subprocess.Popen(["sleep", "60"])  # stands for stage 1; a zombie until it is waited for
    descriptor = os.pidfd_open(child.pid)
    (mine, _), _ = boards(2, timeout=60.0, processes={1: descriptor})
    mine.send(0, 1.0)
    threading.Timer(0.2, child.kill).start()
    began = time.monotonic()
    with pytest.raises(StageFailure, match="stage 1 ended"):
        mine.receive(0)
    assert 0.1 < time.monotonic() - began < 20
    child.wait(20)
    mine.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


class ThreadRendezvous:
    """Rendezvous of processes that are threads: all_gather without a store."""

    def __init__(self, index, depth, barrier, texts, change=lambda what, text: text):
        self.index, self.ranks, self.timeout = index, list(range(depth)), timedelta(seconds=20)
        self.barrier, self.texts, self.change = barrier, texts, change

    def all_gather(self, what, text, purpose):
        self.texts[what, self.index] = self.change(what, text)
        self.barrier.wait(20)
        return [self.texts[what, j] for j in self.ranks]


def met(wanted, change=lambda what, text: text):
    barrier, texts = threading.Barrier(len(wanted)), {}
    rendezvous = [ThreadRendezvous(k, len(wanted), barrier, texts, change) for k in range(len(wanted))]
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(shared_memory_norms, rendezvous, wanted, [lambda _: None] * len(wanted), timeout=60))


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def test_processes_of_one_machine_share_a_page_and_give_it_back():
    before = descriptors()
    ends = met([True, True, True])
    for k, end in enumerate(ends):
        end.send(0, float(k))
    assert all(end.receive(0) == [0.0, 1.0, 2.0] for end in ends)
    for end in ends:
        end.close()
    assert descriptors() == before
    assert "pipeoptim-norms" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("wanted", "change"),
    [
        ([False, True, True], lambda what, text: text),
        ([True, True, False], lambda what, text: text),
        ([True] * 3, lambda what, text: text[:-1] + "?" if what == "norms" else text),  # whose file this is, is another's
    ],
)
def test_all_do_without_where_one_does_not_want_it_or_is_elsewhere(wanted, change):
    before = descriptors()
    assert met(wanted, change) == [None] * 3
    assert descriptors() == before
