"""Messages between stages arrive as they were sent, though their blocks are used again."""

import random
import socket
from collections import deque
from datetime import timedelta

import pytest
import torch

from pipeoptim.engine import link
from pipeoptim.engine.local import SMALL, Channel
from pipeoptim.engine.near import NearReceiver, NearSender
from pipeoptim.errors import PipeOptimError, StageFailure


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
            work, copy = self.sent.popleft()
            work.wait(timedelta(seconds=1))
            assert copy[0].numel() == tensors[0].numel(), "the receiver posted another size than was sent"
            tensors[0].copy_(copy[0])

        return LateWork(arrive)


@pytest.fixture(params=["group", "channel"])
def neighbours(request, monkeypatch):
    """Sender and receiver of one stage, and those of the next."""
    monkeypatch.setattr(link.dist, "get_group_rank", lambda group, rank: rank)
    rest = 1, 1, torch.device("cpu"), 1.0, lambda peer: None
    there, back = (
        [LateGroup()] * 2 if request.param == "group" else [Channel(end) for end in socket.socketpair()] for _ in range(2)
    )
    sender, receiver = (link.Sender, link.Receiver) if request.param == "group" else (NearSender, NearReceiver)
    first = sender(there[0], *rest), receiver(back[1], *rest, ahead=True)
    second = sender(back[0], *rest), receiver(there[1], *rest, ahead=True)
    link.pair(*first)
    link.pair(*second)
    yield first, second
    for end in (*first, *second):
        end.close()


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
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("seed", range(4))
def test_every_message_arrives_as_it_was_however_late_it_is_taken(ends, seed):
    sender, receiver = ends
    generator = random.Random(seed)
    waiting = deque()
    for n, tree in enumerate(trees(generator, 120)):
        sender.send(tree, flags=n, loss_scale=n / 2, part=(n, 120))
        waiting.append((n, tree))
        while waiting and (len(waiting) > 5 or generator.random() < 0.5):
            number, expected = waiting.popleft()
            got = receiver.take()
            assert (receiver.flags, receiver.loss_scale, receiver.part) == (number, number / 2, (number, 120))
            assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
            for a, b in zip(tensors_of(got), tensors_of(expected), strict=True):
                assert a.shape == b.shape and torch.equal(a, b)
    sender.flush()


def test_a_sender_keeps_what_the_peer_has_not_taken_and_no_more(neighbours):
    (sender, from_next), (to_previous, receiver) = neighbours
    memory, numbers = set(), SMALL // 4  # more than a channel sends without a block
    for n in range(60):
        sender.send(torch.full((numbers,), float(n)))
        memory.add(sender._pending[-1][1].memory.data_ptr())
        if n >= 3:  # as in a pipeline: the peer is some messages behind, and answers each
            assert torch.equal(receiver.take(), torch.full((numbers,), float(n - 3)))
            to_previous.send([torch.full((7,), float(n))])
            assert torch.equal(from_next.take()[0], torch.full((7,), float(n)))
            assert len(sender._pending) == 3
    assert len(memory) <= 5  # 4 in turn, and the first message, in a new format


def test_without_answers_few_messages_are_kept(ends):
    sender, receiver = ends
    for n in range(60):
        sender.send(torch.full((10,), float(n)))
        assert torch.equal(receiver.take(), torch.full((10,), float(n)))
        assert len(sender._pending) <= 10


def test_the_last_message_of_a_peer_that_has_gone_is_taken_and_only_the_next_fails(ends, monkeypatch):
    sender, receiver = ends
    for n in range(2):
        sender.send(torch.full((3,), float(n)))
    receiver.take()  # and the second is awaited

    def gone(*_):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:6335.")

    if sender.channel is None:
        monkeypatch.setattr(receiver.group, "recv", gone)
    sender.close()
    assert torch.equal(receiver.take(), torch.ones(3))
    with pytest.raises(StageFailure, match="stage 1 died or closed its connection"):
        receiver.take()


def test_a_foreign_message_is_refused(ends):
    sender, receiver = ends
    receiver.post()
    sender.group.send([sender._memory(link.wire.HEADER).zero_()], 1, 0)
    with pytest.raises(PipeOptimError, match="out of order"):
        receiver.take()
