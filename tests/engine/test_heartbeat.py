"""The heartbeat: who is called when, by what name, and that nobody is blamed for a pause in which nobody could be heard."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from pipeoptim.engine.processes.heartbeat import Heartbeat
from pipeoptim.engine.processes.rendezvous import Rendezvous
from pipeoptim.errors import StageFailure
from stage_processes import free_port


class Calls:
    """What a heartbeat has called, and when it first did."""

    def __init__(self):
        self.messages, self.called = [], threading.Event()

    def __call__(self, message):
        self.messages.append(message)
        self.called.set()


@contextmanager
def heartbeats(store, depth, timeout, stages, holder=None):
    calls = {k: Calls() for k in stages}
    beats = {k: Heartbeat(store(), k, depth, timeout, holder=holder, on_dead=calls[k]) for k in stages}
    try:
        yield beats, calls
    finally:
        for beat in beats.values():
            beat.close()


def test_a_silent_stage_is_named_to_all_and_once():
    store = dist.HashStore()
    store.set("beat/2", "7")  # its last one
    began = time.monotonic()
    with heartbeats(lambda: store, 3, 0.6, (0, 1)) as (beats, calls):
        for k in (0, 1):
            assert calls[k].called.wait(20)
        assert time.monotonic() - began > 0.6
        time.sleep(0.5)
        told = sorted(message for k in (0, 1) for message in calls[k].messages)
        assert len(told) == 2
        assert all(message.removeprefix("first failure: ") == "stage 2 gave no sign of life for 0.6 s" for message in told)
        assert not told[1].startswith("first")  # the one that recorded it
        assert beats[0].cause("stage 1 closed its connection") == calls[0].messages[0]


def test_a_failure_of_one_stage_reaches_all_and_the_first_stays_the_first():
    store = dist.HashStore()
    with heartbeats(lambda: store, 3, 20.0, (0, 1, 2)) as (beats, calls):
        assert beats[1].cause("stage 2 sent nonsense") == "stage 2 sent nonsense"
        assert beats[0].cause("stage 1 closed") == "first failure: stage 2 sent nonsense"
        for k in (0, 2):
            assert calls[k].called.wait(20)
            assert calls[k].messages == ["first failure: stage 2 sent nonsense"]


def test_a_stage_that_has_ended_is_dead_only_to_whom_waits_for_it():
    store = dist.HashStore()
    with heartbeats(lambda: store, 3, 0.5, (0, 1, 2)) as (beats, calls):
        beats[2].close()
        time.sleep(1.5)
        assert calls[0].messages == calls[1].messages == []
        beats[1].note_wait(2)
        assert calls[1].called.wait(20)
        assert calls[1].messages == ["stage 2, which has ended, gave no sign of life for 0.5 s"]


@contextmanager
def store_process():
    port = free_port()
    code = (
        "import sys, time, torch.distributed as d\n"
        f"store = d.TCPStore('127.0.0.1', {port}, None, True, wait_for_workers=False)\nprint('up', flush=True)\ntime.sleep(120)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "up"
        yield process, lambda: dist.TCPStore("127.0.0.1", port, None, False, timeout=timedelta(seconds=60))
    finally:
        process.kill()
        process.wait()


def test_nobody_is_blamed_while_the_launchers_store_was_stopped():
    with store_process() as (process, connect), heartbeats(connect, 3, 0.6, (0, 1, 2)) as (_, calls):
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.0)
        assert [calls[k].messages for k in range(3)] == [[], [], []]


def test_a_stage_that_holds_the_store_is_named_when_it_stops_and_nothing_waits_for_the_store():
    with store_process() as (process, connect), heartbeats(connect, 3, 0.6, (1, 2), holder=0) as (beats, calls):
        connect().set("beat/0", "1")
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for k in (1, 2):
            assert calls[k].called.wait(20)
            assert calls[k].messages == ["stage 0, whose process holds the store, gave no sign of life for 0.6 s"]
            assert beats[k].cause("stage 0 closed") == calls[k].messages[0]
            beats[k].close()
        assert time.monotonic() - began < 20
        process.send_signal(signal.SIGCONT)


def test_without_an_answer_of_the_store_a_failure_is_told_all_the_same():
    with store_process() as (process, connect), heartbeats(connect, 2, 60.0, (1,), holder=0) as (beats, _):
        process.send_signal(signal.SIGSTOP)
        told = beats[1].cause("stage 0 closed its connection")
        assert (
            told == "stage 0 closed its connection; stage 0, whose process holds the store, does not answer: look there first"
        )
        process.send_signal(signal.SIGCONT)


@pytest.fixture
def world():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wait_for_processes_that_do_not_come_can_be_interrupted(world):
    meeting = Rendezvous("test", (0, 1), timeout=60)
    threading.Timer(0.3, meeting.interrupt).start()
    began = time.monotonic()
    with pytest.raises(StageFailure, match="did not meet to be set up: the wait was interrupted"):
        meeting.exchange_settings("mine")
    assert time.monotonic() - began < 20


def test_the_next_generation_meets_nothing_of_the_last(world):
    first = Rendezvous("test", (0,), timeout=60)
    assert first.exchange_settings("old") == ["old"]
    old = first.group("links", "gloo")
    second = first.next_generation()
    assert (second.generation, second.number) == (1, first.number)
    assert not second.store.check(["settings/0"])
    assert second.exchange_settings("new") == ["new"]
    new = second.group("links", "gloo")
    assert new.group_name != old.group_name
    third = Rendezvous("test", (0,), timeout=60)  # another pipeline of the same processes
    assert (third.generation, third.number) == (0, first.number + 1)
    for meeting in (first, second):
        meeting.close()
