"""A link between two addresses shares no memory, and delivers as one within a machine does; nobody else gets a connection."""

from __future__ import annotations

import socket
import sys
import threading
from functools import partial

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from pipeoptim.engine.processes.kept_connections import BoundaryListener, call
from pipeoptim.engine.transport import kept_link
from pipeoptim.engine.transport.kept_link import KeptLink, LinkSet
from pipeoptim.errors import CorruptionError, StageFailure
from test_kept_link import LARGE, both, image_of, receive, send

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="survive is for Linux, where 127.0.0.2 needs no setting up")
HOST = "127.0.0.2"


def ends(store: HashStore) -> tuple[KeptLink, KeptLink, BoundaryListener]:
    listener = BoundaryListener(store, 0, 0, HOST)
    first = LinkSet().add(1, partial(call, store, 0, 0), 10.0, apart=True)
    return first, LinkSet().add(0, listener.accept, 10.0, apart=True), listener


def test_both_ends_are_replaced_and_each_message_comes_once_with_its_bits() -> None:
    store = HashStore()
    first, second, listener = ends(store)
    both(lambda: send(first, range(5)), lambda: receive(second, range(5)))
    assert first._connection is not None
    assert first._connection.getpeername()[0] == HOST
    earlier_first, earlier_second = image_of(first), image_of(second)
    both(lambda: send(first, range(5, 10)), lambda: receive(second, range(5, 8)))
    second.drop()  # dies with two messages in its socket; its image listens elsewhere
    listener.close()
    listener.listen(store, 1)
    both(lambda: send(first, range(10, 12)), lambda: receive(earlier_second, range(5, 12)))
    first.drop()
    both(lambda: send(earlier_first, range(5, 14)), lambda: receive(earlier_second, range(12, 14)))
    assert not earlier_first.replays
    listener.close()


@pytest.mark.parametrize("more", range(3))
def test_ends_that_send_each_other_more_than_the_sockets_hold_at_once_wait_for_neither(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_link, "_BUFFER", 4608)
    first, second, listener = ends(HashStore())
    both(first.restore, second.restore)
    many, size = 4, 100 * LARGE  # 8 MB each: more than the kernel's buffers of both ends

    def talk(link: KeptLink) -> None:
        for n in range(many):
            link.send([torch.full((size,), float(n)), *[torch.zeros(1)] * more])
        for n in range(many):
            found = link.receive().tree[0]
            assert float(found[0]) == float(found[-1]) == n
        done.append(link)

    done = list[KeptLink]()
    both(lambda: talk(first), lambda: talk(second))
    assert len(done) == 2
    listener.close()


def test_what_came_while_an_end_waited_to_send_counts_as_not_received_once_the_connection_is_gone() -> None:
    first, second, listener = ends(HashStore())
    both(first.restore, second.restore)
    first.send(torch.ones(3))
    assert second._readable(10)
    assert second._connection is not None
    second._inbox += kept_link._some(second._connection)
    assert second._readable(0)  # though nothing is left in the socket
    second.drop()
    both(first.look_after, second.restore)
    assert torch.equal(second.receive().tree, torch.ones(3))
    assert second._received == 1
    listener.close()


def test_a_message_that_was_damaged_on_its_way_is_not_used() -> None:
    first, second, listener = ends(HashStore())
    both(first.restore, second.restore)
    sent = list[bytes]()

    class Damaging:
        """In place of the socket: turns over a bit of the payload, which is sent second."""

        def __init__(self, own: socket.socket) -> None:
            self.own = own

        def send(self, data: memoryview, flags: int) -> int:
            sent.append(bytes(data))
            changed = bytearray(data)
            if len(sent) == 2:
                changed[0] ^= 4
            return self.own.send(changed, flags)

        def close(self) -> None:
            self.own.close()

    assert first._connection is not None
    first._connection = Damaging(first._connection)  # type: ignore[assignment]
    first.send(torch.ones(64))
    with pytest.raises(CorruptionError, match="message 0 from stage 0 has another checksum than it was sent with"):
        second.receive()
    assert len(sent) == 3  # what describes it, the payload, the checksum
    listener.close()


def test_a_caller_without_the_secret_and_one_that_has_been_replaced_are_refused() -> None:
    store, refused = HashStore(), list[bool]()
    listener = BoundaryListener(store, 0, 0, HOST)
    port = int(store.get("kept/0").decode().split()[-1])

    def stranger() -> None:
        with socket.create_connection((HOST, port), 10) as connection:
            connection.sendall(bytes(24))
            refused.append(not connection.recv(1))

    def caller(generation: int, seconds: float) -> None:
        with call(store, 0, generation, seconds, seconds):
            pass

    def nobody_comes(waits, *arguments) -> None:
        with pytest.raises(StageFailure):
            waits(*arguments)

    both(stranger, lambda: nobody_comes(listener.accept, 0.5))
    assert refused == [True]
    both(lambda: caller(2, 10), lambda: listener.accept(10).close())
    both(lambda: nobody_comes(caller, 1, 0.5), lambda: nobody_comes(listener.accept, 1.0))
    both(lambda: caller(2, 10), lambda: listener.accept(10).close())
    listener.close()


def test_a_program_that_has_got_the_port_of_a_dead_stage_is_not_taken_for_it() -> None:
    store = HashStore()
    with socket.create_server((HOST, 0)) as other:
        store.set("kept/0", f"0 {'11' * 16} {'22' * 16} {HOST} {other.getsockname()[1]}")

        def echo() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(connection.recv(24, socket.MSG_WAITALL))

        threading.Thread(target=echo, daemon=True).start()
        with pytest.raises(StageFailure, match="stage 1 did not come within 0.5 s"):
            call(store, 0, 0, 0.5, 0.5)
