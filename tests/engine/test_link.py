"""Messages between stages arrive as they were sent, though their blocks are used again."""

import ctypes
import os
import random
import socket
import struct
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

from late_streams import WAITS, LateStreams, until
from pipeoptim.engine.transport import link
from pipeoptim.engine.transport.local_link import LocalReceiver, LocalSender
from pipeoptim.engine.transport.shared_ring import SharedRing, make_ring_memory
from pipeoptim.engine.transport.staged_link import StagedReceiver, StagedSender
from pipeoptim.engine.transport.unix_channel import SMALL, UnixChannel
from pipeoptim.errors import CorruptionError, PipeOptimError, StageFailure


class LateWork:
    """A transfer that reads what is sent, and writes what is received, as late as it may."""

    def __init__(self, act=None):
        self.act, self.done = act, False

    def wait(self, timeout: timedelta):
        if not self.done:
            self.act()
            self.done = True

    def is_completed(self):
        return self.done


class LateGroup:
    """One direction of a group: nothing moves before somebody waits or a receive needs it."""

    def __init__(self):
        self.sent: deque[tuple[LateWork, list[torch.Tensor]]] = deque()

    def send(self, tensors, place, tag):
        copy: list[torch.Tensor] = []
        work = LateWork(lambda: copy.append(tensors[0].clone()))
        self.sent.append((work, copy))
        return work

    def recv(self, tensors, place, tag):
        def arrive():
            until(lambda: self.sent, "a message was sent")  # by the thread of a staged sender
            work, copy = self.sent.popleft()
            work.wait(timedelta(seconds=1))
            assert copy[0].numel() == tensors[0].numel(), "the receiver posted another size than was sent"
            tensors[0].copy_(copy[0])

        return LateWork(arrive)


def ring_memory(capacity):
    try:
        return make_ring_memory(capacity)
    except OSError as error:
        pytest.skip(str(error))


def kill(channel):
    """All that the kernel does for an end whose process was killed: the ring is not told."""
    channel._socket.close()


def channel_ends(with_ring):
    connections = socket.socketpair()
    if not with_ring:
        return [UnixChannel(one) for one in connections]
    fd = ring_memory(8 * SMALL)
    ends = [UnixChannel(one, ring=SharedRing(fd)) for one in connections]
    os.close(fd)
    return ends


@contextmanager
def connected(kind, carrier, window=1, seed=0, forgotten=None):
    """Sender and receiver of one stage, and those of the next; the side streams of both, where they are staged."""
    rest = 1, 1, torch.device("cpu"), 10.0, lambda peer: None
    there, back = ([LateGroup()] * 2 if carrier == "group" else channel_ends(with_ring=carrier == "ring") for _ in range(2))
    streams = [LateStreams(seed, forgotten), LateStreams(seed + 1, forgotten)] if kind == "staged" else []
    if kind == "staged":
        classes = [(partial(StagedSender, own), partial(StagedReceiver, own)) for own in streams]
    else:
        classes = [(link.Sender, link.Receiver) if carrier == "group" else (LocalSender, LocalReceiver)] * 2
    first = classes[0][0](there[0], *rest), classes[0][1](back[1], *rest, ahead=True)
    second = classes[1][0](back[0], *rest), classes[1][1](there[1], *rest, ahead=True)
    link.pair(*first)
    link.pair(*second)
    for end in (*first, *second):
        end.window = int(window)
    try:
        yield first, second, streams
    finally:
        for end in (*first, *second):
            end.close()


@pytest.fixture(autouse=True)
def ranks_are_places(monkeypatch):
    monkeypatch.setattr(link.dist, "get_group_rank", lambda group, rank: rank)


@pytest.fixture(
    params=["plain group", "plain group 3", "plain channel", "plain ring", "staged group", "staged group 3", "staged ring"]
)
def neighbours(request):
    with connected(*request.param.split()) as (first, second, streams):
        yield first, second
        for own in streams:
            own.check()


@pytest.fixture
def ends(neighbours):
    (sender, _), (_, receiver) = neighbours
    return sender, receiver


def trees(generator: random.Random, count: int):
    """Trees of a few formats, some of equal size in bytes, in runs of random length."""
    makers = [
        lambda x: torch.full((4, 8), x),
        lambda x: torch.full((8, 4), x),
        lambda x: (torch.full((16,), x), None, {"mask": torch.full((16,), x)}),
        lambda x: torch.full((500,), x),
        lambda x: [torch.full((3,), x), torch.full((5, 2), x)],
        lambda x: torch.full((SMALL // 2,), x),
        lambda x: [torch.full((0, 3), x), torch.full((4, 7), x).t()],
    ]
    maker = makers[0]
    for n in range(count):
        if generator.random() < 0.2:
            maker = generator.choice(makers)
        yield maker(float(n))


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("seed", range(4))
def test_every_message_arrives_as_it_was_however_late_it_is_taken(ends, seed):
    sender, receiver = ends
    exchange(sender, receiver, seed)


def exchange(sender, receiver, seed):
    """Messages in changing formats, taken late; raises AssertionError where one is not what was sent."""
    generator = random.Random(seed)
    waiting = deque()
    for n, tree in enumerate(trees(generator, 120)):
        sender.send(tree, flags=n, loss_scale=n / 2, share=(n, 120))
        waiting.append((n, tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)))
        for tensor in tensors_of(tree):
            tensor.zero_()  # as the next forward may
        while waiting and (len(waiting) > 5 or generator.random() < 0.5):
            number, expected = waiting.popleft()
            got, *header = receiver.receive()
            assert tuple(header) == (number, number / 2, (number, 120))
            assert tree_structure(got) == tree_structure(expected)
            for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
                assert a.shape == b.shape and torch.equal(a, b)
    sender.flush()


@pytest.mark.parametrize("carrier", ["group", "ring"])
@pytest.mark.parametrize("wait", [None, *WAITS])
def test_each_wait_of_a_staged_link_is_needed(wait, carrier):
    with connected("staged", carrier, 3, forgotten=wait) as ((sender, _), (_, receiver), streams):
        try:
            exchange(sender, receiver, 5)
            streams[1].check()
        except AssertionError:
            assert wait is not None
        else:
            assert wait is None, f"all arrived as it was sent without waiting until it is {wait}"


def test_what_is_handed_over_waits_for_the_device_no_more():
    with connected("staged", "group") as ((sender, _), _, _):
        for n in range(5):
            sender.send(torch.full((3,), float(n)))
        sender.hand_over()
        assert len(sender.group.sent) == 6  # and the notice of a format


@pytest.mark.parametrize("kind", ["plain channel", "plain ring", "staged ring"])
def test_a_peer_that_has_gone_is_named_with_a_later_message(kind):
    with connected(*kind.split()) as ((sender, _), (_, receiver), _):
        sender.send(torch.zeros(3))
        receiver.receive()
        receiver.close()
        with pytest.raises(StageFailure, match="stage 1 died or closed its connection"):
            send_several(sender)


@pytest.mark.parametrize("carrier", ["channel", "ring"])
def test_a_peer_that_was_killed_before_it_took_a_large_message_is_named(carrier):
    with connected("plain", carrier) as ((sender, _), (_, receiver), _):
        for _ in range(4):  # until blocks are used again
            sender.send(torch.zeros(SMALL))
            receiver.receive()
        sender.send(torch.zeros(SMALL))
        kill(receiver.channel)
        with pytest.raises(StageFailure, match="stage 1 died or closed its connection"):
            send_several(sender, SMALL)


def test_a_device_that_fails_is_not_taken_for_a_peer_that_does():
    with connected("staged", "channel") as ((sender, _), _, (own, _)):
        own.copy_out = lambda *_: Failing()
        with pytest.raises(PipeOptimError, match="the device failed before a message had been copied from it") as failed:
            send_several(sender)
        assert not isinstance(failed.value, StageFailure)


def send_several(sender, numbers=3):
    for _ in range(20):
        sender.send(torch.zeros(numbers))
        sender.hand_over()


class Failing:
    """An event."""

    def synchronize(self):
        raise RuntimeError("out of luck")


def test_a_sender_keeps_what_the_peer_has_not_taken_and_no_more(neighbours):
    (sender, from_next), (to_previous, receiver) = neighbours
    memory, numbers = set(), SMALL // 4  # more than a channel sends without a block
    for n in range(60):
        sender.send(torch.full((numbers,), float(n)))
        memory.add(sender._pending[-1][1].memory.data_ptr())
        if n >= 3:  # as in a pipeline: the peer is some messages behind, and answers each
            assert torch.equal(receiver.receive().tree, torch.full((numbers,), float(n - 3)))
            to_previous.send([torch.full((7,), float(n))])
            assert torch.equal(from_next.receive().tree[0], torch.full((7,), float(n)))
            assert len(sender._pending) == 3 or isinstance(sender, StagedSender)  # which has copies of its own in the channel
            assert len(sender._pending) <= 3
    assert len(memory) <= 5  # 4 in turn, and the first message, in a new format


def test_without_answers_few_messages_are_kept(ends):
    sender, receiver = ends
    for n in range(60):
        sender.send(torch.full((10,), float(n)))
        assert torch.equal(receiver.receive().tree, torch.full((10,), float(n)))
        assert len(sender._pending) <= 10


def test_the_last_message_of_a_peer_that_has_gone_is_taken_and_only_the_next_fails(ends, monkeypatch):
    sender, receiver = ends
    for n in range(2):
        sender.send(torch.full((3,), float(n)))
    receiver.receive()  # and the second is awaited

    def gone(*_):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:6335.")

    if sender.channel is None:
        monkeypatch.setattr(receiver.group, "recv", gone)
    sender.hand_over()  # as drain() does; what a thread still has of it is lost with the link
    sender.close()
    assert torch.equal(receiver.receive().tree, torch.ones(3))
    with pytest.raises(StageFailure, match="stage 1 died or closed its connection"):
        receiver.receive()


def test_a_foreign_message_is_refused(ends):
    sender, receiver = ends
    receiver.post_receive()
    sender.group.send([sender._memory(link.message.HEADER).zero_()], 1, 0)
    with pytest.raises(PipeOptimError, match="out of order"):
        receiver.receive()


@pytest.mark.parametrize("place", [18, 40, 130, -1])  # flags and loss scale in the header, the first and the last number
@pytest.mark.parametrize("kind", ["plain group", "plain group 3", "staged group"])
def test_a_bit_that_flips_on_the_way_is_found_by_the_checksum(kind, place):
    with connected(*kind.split()) as ((sender, _), (_, receiver), _):
        sender.checksums, receiver.name = True, "activations from stage 0 to stage 1"
        for n in range(6):
            sender.send(torch.full((100 if n < 3 else 16,), float(n)))
            assert torch.equal(receiver.receive().tree, torch.full((100 if n < 3 else 16,), float(n)))
        sender.send(torch.ones(16))
        sender.hand_over()
        work, block = receiver._posted[0]
        work.wait(timedelta(seconds=1))
        block[place] ^= 16
        with pytest.raises(CorruptionError, match="^message 6 of the activations from stage 0 to stage 1 has another checksum"):
            receiver.receive()


@pytest.mark.parametrize("room", [400, 8 * SMALL])  # of which the small one is full again and again
def test_no_message_of_a_ring_is_lost_whoever_sleeps(room):
    fd, chance, took = ring_memory(room), random.Random(3), []
    ends = [UnixChannel(one, ring=SharedRing(fd)) for one in socket.socketpair()]
    os.close(fd)
    sizes = [chance.randrange(1, 200) for _ in range(3000)]

    def take():
        for n, size in enumerate(sizes):
            into = (ctypes.c_char * size)()
            if n % 7 == 0:
                time.sleep(1e-4)
            ends[1].get([into], size)
            took.append(into.raw == bytes([n % 251]) * size)

    for end in ends:
        end.wait_at_most(timedelta(seconds=20))
    taker = threading.Thread(target=take)
    taker.start()
    for n, size in enumerate(sizes):
        ends[0].put([bytes([n % 251]) * size], size)
        if n % 11 == 0:
            time.sleep(1e-4)
    taker.join(20)
    assert took == [True] * len(sizes)
    for end in ends:
        end.close()


def test_descriptors_come_through_though_bytes_that_wake_come_before_them():
    sender, receiver = channel_ends(with_ring=True)
    large = SMALL + 64
    for n in range(3):
        receiver._ring.sleeps(True)  # as if it were about to sleep, and found the message itself
        sender.send([torch.full((8,), n, dtype=torch.uint8)], 0, 0)
        block = torch.empty(large + 64 * n, dtype=torch.uint8)
        sender.send([sender.memory(block.numel()).fill_(n)], 0, 0)
        small = torch.empty(8, dtype=torch.uint8)
        for into in (small, block):
            receiver.recv([into], 0, 0).wait(timedelta(seconds=1))
            assert set(into.tolist()) == {n}
    sender.close()
    with pytest.raises(RuntimeError, match="closed by peer"):
        receiver.recv([small], 0, 0).wait(timedelta(seconds=1))
    receiver.close()


def take_block(receiver):
    block = torch.empty(SMALL + 64, dtype=torch.uint8)
    receiver.recv([block], 0, 0).wait(timedelta(seconds=0.2))


def take_small(receiver):
    receiver.wait_at_most(timedelta(seconds=5))
    receiver.get([(ctypes.c_char * 64)()], 64)


def fill_ring(sender):
    """And one message more, which waits."""
    sender.wait_at_most(timedelta(seconds=5))
    for _ in range(8 * SMALL // 64 + 1):
        sender.put([bytes(64)], 64)


def after_a_block(sender, receiver):
    """The receiver has said that it took one, which the sender has not read."""
    sender.send([sender.memory(SMALL + 64)], 0, 0)
    take_block(receiver)


def after_a_byte_that_woke_nobody(sender, receiver):
    receiver._ring.sleeps(True)
    sender.put([bytes(64)], 64)
    receiver.get([(ctypes.c_char * 64)()], 64)
    receiver._ring.sleeps(False)


def block_without_memory(sender, receiver):
    after_a_block(sender, receiver)
    sender.put([struct.pack("<3q", 1, SMALL + 64, 1)], 24)


def no_more(sender, receiver):
    """The socket takes no more bytes."""
    sender.wait_at_most(timedelta(seconds=0.2))
    with suppress(BlockingIOError):
        while True:
            sender._socket.send(bytes(SMALL), socket.MSG_DONTWAIT)
    with suppress(BlockingIOError):
        while True:
            sender._socket.send(b".", socket.MSG_DONTWAIT)


CLOSED = "connection closed by peer"
ENDS = {  # of a channel with a ring: what was before, how it ends, what then waits, what is told
    "full, killed with an answer unread": (after_a_block, lambda s, r: kill(r), lambda s, r: fill_ring(s), CLOSED),
    "full, killed asleep": (after_a_byte_that_woke_nobody, lambda s, r: kill(r), lambda s, r: fill_ring(s), CLOSED),
    "full, interrupted": (after_a_block, lambda s, r: s.interrupt(), lambda s, r: fill_ring(s), CLOSED),
    "killed before the descriptor": (
        block_without_memory,
        lambda s, r: kill(s),
        lambda s, r: take_block(r),
        "without its memory",
    ),
    "frozen before the descriptor": (block_without_memory, lambda s, r: None, lambda s, r: take_block(r), "timed out"),
    "no room for a descriptor": (no_more, lambda s, r: None, lambda s, r: s.send([s.memory(SMALL + 64)], 0, 0), "timed out"),
    "killed with nothing sent": (after_a_block, lambda s, r: kill(s), lambda s, r: take_small(r), CLOSED),
}


@pytest.mark.parametrize("case", ENDS)
def test_whatever_lies_in_a_channel_its_end_is_told_at_once_and_in_the_same_words(case):
    before, end, waits, words = ENDS[case]
    sender, receiver = channel_ends(with_ring=True)
    before(sender, receiver)
    end(sender, receiver)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=words):
        waits(sender, receiver)
    assert time.monotonic() - began < 3
    for one in (sender, receiver):
        one.close()


def test_a_message_arrives_that_a_sender_put_in_last_of_all_before_it_was_killed():
    sender, receiver = channel_ends(with_ring=True)
    after_a_block(sender, receiver)

    def put_and_die():
        until(lambda: sender._ring._words[9], "the receiver sleeps")
        sender._ring.put([b"x" * 64], 64)
        kill(sender)

    dying = threading.Thread(target=put_and_die)
    dying.start()
    take_small(receiver)
    dying.join()
    receiver.close()
