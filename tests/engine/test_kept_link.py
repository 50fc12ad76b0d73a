"""A link whose ends are replaced delivers every message once, in order, with the bits of the first time."""

from __future__ import annotations

import copy
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeoptim.engine.processes.kept_connections import BoundaryListener, call
from pipeoptim.engine.transport import kept_link
from pipeoptim.engine.transport.kept_link import KeptLink, LinkSet
from pipeoptim.errors import StageFailure

SMALL, LARGE = 40, 20_000  # float32 numbers: one goes through the socket, the other in memory of its own


class Meeting:
    """Where both ends get the ends of a new pair of sockets."""

    def __init__(self) -> None:
        self._waiting: deque[socket.socket] = deque()
        self._lock = threading.Lock()

    def dial(self, seconds: float) -> socket.socket:
        with self._lock:
            if self._waiting:
                return self._waiting.popleft()
            own, theirs = socket.socketpair()
            self._waiting.append(theirs)
            return own


def message(n: int) -> torch.Tensor:
    return torch.full((LARGE if n % 3 == 0 else SMALL,), float(n), requires_grad=n % 2 == 0)


def both(*work) -> None:
    """At the same time, since a new connection needs both ends."""
    errors = list[BaseException]()

    def do(one) -> None:
        try:
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=do, args=(one,), daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for error in errors:
        raise error


def ends() -> tuple[KeptLink, KeptLink]:
    meeting = Meeting()
    return LinkSet().add(1, meeting.dial, 10.0), LinkSet().add(0, meeting.dial, 10.0)


def image_of(link: KeptLink) -> KeptLink:
    """What a fork would have of it, without its connection."""
    connection, link._connection = link._connection, None
    found = copy.copy(link)
    found._log, found._queue = deque(link._log), deque(link._queue)
    link._connection = connection
    return found


def send(link: KeptLink, numbers) -> None:
    for n in numbers:
        link.send(message(n), flags=n, loss_scale=n / 2, share=(n, 2 * n))


def receive(link: KeptLink, numbers) -> None:
    for n in numbers:
        found = link.receive()
        assert torch.equal(found.tree, message(n))
        assert (found.tree.requires_grad, found.flags, found.loss_scale, found.share) == (n % 2 == 0, n, n / 2, (n, 2 * n))


def test_a_receiver_that_goes_back_gets_again_what_it_had_and_a_sender_sends_nothing_twice() -> None:
    sender, receiver = ends()
    both(lambda: send(sender, range(5)), lambda: receive(receiver, range(5)))
    earlier_sender, earlier_receiver = image_of(sender), image_of(receiver)
    both(lambda: send(sender, range(5, 10)), lambda: receive(receiver, range(5, 8)))
    receiver.drop()  # dies with two messages in its socket
    both(lambda: send(sender, range(10, 12)), lambda: receive(earlier_receiver, range(5, 12)))
    sender.drop()  # dies as well; its image does the same again
    both(lambda: send(earlier_sender, range(5, 14)), lambda: receive(earlier_receiver, range(12, 14)))
    assert not earlier_sender.replays


def test_both_ends_go_back_at_once() -> None:
    sender, receiver = ends()
    both(lambda: send(sender, range(4)), lambda: receive(receiver, range(2)))
    earlier_receiver = image_of(receiver)
    both(lambda: send(sender, range(4, 6)), lambda: receive(receiver, range(2, 6)))
    earlier_sender = image_of(sender)
    both(lambda: send(sender, range(6, 8)), lambda: receive(receiver, range(6, 8)))
    sender.drop()
    receiver.drop()
    both(lambda: send(earlier_sender, range(6, 12)), lambda: receive(earlier_receiver, range(2, 12)))


def test_what_no_image_can_ask_for_is_forgotten_and_more_than_that_is_refused() -> None:
    sender, receiver = ends()
    both(lambda: send(sender, range(6)), lambda: receive(receiver, range(6)))
    too_early = image_of(receiver)
    too_early._received = 3
    receiver.note_image()
    receiver.send(message(0))  # the image does not stand yet
    sender.receive()
    assert len(sender._log) == 6
    receiver.note_standing()
    receiver.send(message(1))
    sender.receive()
    assert not sender._log
    receiver.drop()
    threading.Thread(target=too_early.restore, daemon=True).start()
    with pytest.raises(StageFailure, match="asks for message 3, but messages before 6 are forgotten; resume from the newest"):
        sender.restore()


def test_large_messages_use_again_the_memory_of_forgotten_ones_but_an_image_none_that_may_still_be_read() -> None:
    sender, receiver = ends()
    places = set()
    for n in range(0, 300, 3):  # large ones
        both(lambda n=n: send(sender, [n]), lambda n=n: receive(receiver, [n]))
        places.add(sender._log[-1].slot.block.data_ptr())
        receiver.note_image()
        receiver.note_standing()
        both(lambda: receiver.send(message(1)), sender.receive)
    assert len(places) == 1
    both(lambda: send(sender, [300]), lambda: receive(receiver, [300]))
    earlier = image_of(sender)
    both(lambda: send(sender, [303]), lambda: receiver._readable(10))  # not read yet
    sender.drop()
    earlier.note_takeover()
    slot = earlier._take_slot(4 * LARGE)  # before it has connected, it does again what it has done
    slot.block.fill_(0)
    receive(receiver, [303])
    large = torch.zeros(2 * LARGE)
    both(lambda: earlier.send(message(303)), receiver.restore)
    both(lambda: earlier.send(large), lambda: receive_equal(receiver, large))  # does not fit, and gets larger slots


def receive_equal(link: KeptLink, tree: torch.Tensor) -> None:
    assert torch.equal(link.receive().tree, tree)


def test_two_ends_that_send_more_than_sockets_hold_read_meanwhile() -> None:
    one, other = ends()
    many = 200  # of 8 KiB, both ways, before either receives

    def talk(link: KeptLink) -> None:
        for n in range(many):
            link.send(torch.full((2048,), float(n)))
        for n in range(many):
            assert float(link.receive().tree[0]) == n

    both(lambda: talk(one), lambda: talk(other))


@pytest.mark.parametrize("more", range(6))  # the longer its description, the earlier in a message the socket is full
def test_an_end_whose_large_messages_do_not_fit_reads_meanwhile(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_link, "_BUFFER", 4608)
    one, other = ends()
    many = 20

    def fill() -> None:
        for n in range(many):
            one.send([torch.full((LARGE,), float(n)), *[torch.zeros(1)] * more])

    def answer() -> None:
        other.send(torch.ones(1))
        end = time.monotonic() + 10
        while not one._received:  # it is waited for by nobody
            assert time.monotonic() < end
            time.sleep(0.001)
        assert [float(other.receive().tree[0][0]) for _ in range(many)] == list(range(many))
        done.append(True)

    done = list[bool]()
    both(fill, answer)
    assert done


def test_a_neighbour_that_has_ended_is_not_waited_for_until_it_is_there_again() -> None:
    store = HashStore()
    listener = BoundaryListener(store, 0, 0)
    links = LinkSet()
    one = links.add(1, partial(call, store, 0, 0), 1.0)
    other = LinkSet().add(0, listener.accept, 10.0)
    both(lambda: send(one, range(2)), lambda: receive(other, range(2)))
    earlier = image_of(other)
    other.close()
    listener.close()
    links.look_after()  # as where a last meeting waits for what may be there already
    listener.listen(store, 1)
    both(links.look_after, lambda: send(earlier, range(1)))
    receive(one, range(1))


def test_an_end_that_has_just_taken_over_is_there_for_its_neighbour_while_it_waits_for_something_else() -> None:
    store = HashStore()
    listener = BoundaryListener(store, 0, 0)
    one = LinkSet().add(1, partial(call, store, 0, 0), 10.0)
    links = LinkSet()
    other = links.add(0, listener.accept, 10.0)
    done = threading.Event()

    def wait_elsewhere() -> None:  # as for the norm of a stage that first sends its message
        end = time.monotonic() + 10
        while not done.wait(0.01):
            assert time.monotonic() < end
            links.look_after()

    def send_and_tell() -> None:
        send(one, range(1))
        done.set()

    both(wait_elsewhere, send_and_tell)
    receive(other, range(1))
    other.close()
    links.look_after()
    assert other.replays  # it has no connection, and makes none


def test_strangers_who_fill_the_queue_of_callers_hold_up_nobody_for_longer_than_the_time_out() -> None:
    store, strangers, refused = HashStore(), list[socket.socket](), list[str]()
    listener = BoundaryListener(store, 0, 0)
    *_, name = store.get("kept/0").decode().split()
    with suppress(BlockingIOError):
        while True:
            strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            strangers[-1].setblocking(False)
            strangers[-1].connect("\0" + name)

    def call_once() -> None:
        try:
            call(store, 0, 0, 0.1)
        except StageFailure as error:
            refused.append(str(error))

    both(call_once)
    assert refused == ["stage 1 did not come within 0.1 s to be connected"]
    for stranger in strangers:
        stranger.close()
    listener.close()
