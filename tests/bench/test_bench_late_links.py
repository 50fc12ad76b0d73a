"""A slow link holds messages back at its end: for exactly as long as it says, in order, and nobody else waits for them."""

import socket
from types import SimpleNamespace

import pytest
import torch

from pipeoptim.bench import slow
from pipeoptim.engine.processes.connect import LOCAL_LINKS
from pipeoptim.engine.transport import link as transport_link
from pipeoptim.engine.transport import message
from pipeoptim.engine.transport.link import NEVER
from pipeoptim.engine.transport.local_link import LocalSender
from pipeoptim.engine.transport.unix_channel import SMALL, UnixChannel

CPU, SIZE = torch.device("cpu"), message.HEADER + 64


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeps move; it says how long they were in all."""

    def sleep(seconds):
        found.now += seconds
        found.slept += seconds

    found = SimpleNamespace(now=100.0, slept=0.0)
    monkeypatch.setattr(slow, "time", SimpleNamespace(monotonic=lambda: found.now, sleep=sleep))
    for module in (message, transport_link):
        monkeypatch.setattr(module, "monotonic_ns", lambda: round(found.now * 1e9))
    return found


@pytest.fixture
def link(monkeypatch, clock):
    """Makes both ends of a link."""
    ends = []

    def make(delay, bandwidth, window=4):
        monkeypatch.setenv(slow.DELAY, str(delay))
        monkeypatch.setenv(slow.BANDWIDTH, str(bandwidth))
        near, far = (UnixChannel(one, window) for one in socket.socketpair())
        sender = LocalSender(near, 1, 1, CPU, 5.0, lambda peer: None)
        receiver = slow.LateReceiver(far, 0, 0, CPU, 5.0, lambda peer: None, ahead=True)
        ends.extend((sender, receiver))
        return sender, receiver

    yield make
    for end in ends:
        end.close()


@pytest.mark.parametrize("numbers", [4, SMALL // 4])  # through the socket and through shared memory
def test_messages_arrive_late_in_order_and_hold_up_nobody(clock, link, numbers):
    sender, receiver = link(delay=1.0, bandwidth=0.0)
    for i in range(4):  # the window: as many as the order of the actions allows
        sender.send(torch.full((numbers,), float(i)))
        clock.now += 0.25  # the sender computes
    assert clock.slept == 0
    for i in range(4):
        assert receiver.receive().tree.tolist() == [i] * numbers
        assert clock.now == pytest.approx(101.0 + 0.25 * i)
    assert clock.slept == pytest.approx(0.75)  # the first one's time had come, and nobody waits twice for the same second
    clock.now += 5.0
    sender.send(torch.zeros(7))  # in a new format, behind its announcement
    clock.now += 3.0
    assert receiver.receive().tree.tolist() == [0.0] * 7
    assert clock.slept == pytest.approx(0.75)
    assert receiver.least_late == pytest.approx(1e9, abs=1e3)  # slack="auto" measures the delay as on a real link


def test_what_was_late_long_ago_counts_no_more(clock, link):
    sender, receiver = link(delay=1.0, bandwidth=0.0)
    assert receiver.lately_late == NEVER
    for late in [1.0, *[3.0] * 130, *[2.0] * 130]:
        sender.send(torch.zeros(4))
        clock.now += late
        receiver.receive()
        if late == 3.0:
            earlier = receiver.lately_late
    assert earlier == pytest.approx(3e9, abs=1e3)
    assert receiver.lately_late == pytest.approx(2e9, abs=1e3)
    assert receiver.least_late == pytest.approx(1e9, abs=1e3)


def test_bytes_leave_one_message_after_the_other(clock, link):
    sender, receiver = link(delay=1.0, bandwidth=SIZE / 0.5)
    sender.send(torch.zeros(16))  # announced in a header, described in another
    receiver.receive()
    clock.now = 200.0
    for _ in range(3):
        sender.send(torch.zeros(16))
    for i in range(3):
        receiver.receive()
        assert clock.now == pytest.approx(201.5 + 0.5 * i)


def test_only_a_slow_group_has_late_links():
    before = dict(LOCAL_LINKS)
    assert slow.LateReceiver not in [receiver for _, receiver in before.values()]
    try:
        slow.register()
        assert {**before, "slow": (LocalSender, slow.LateReceiver)} == LOCAL_LINKS
    finally:
        LOCAL_LINKS.pop("slow", None)
