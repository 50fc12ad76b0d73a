"""Processes of one machine find each other's sockets or agree to do without; a channel gives back what it took."""

import os
import secrets
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

import pipeoptim as po
from pipeoptim.engine.transport.unix_channel import SMALL, UnixChannel, _remaining_views, check_transport, connect_neighbours
from pipeoptim.errors import StageFailure

SECOND = timedelta(seconds=1)
LARGE = SMALL + 64


def message(channel, value, size=LARGE):
    """Send one; what says whether it was taken."""
    return channel.send([channel.memory(size).fill_(value)], 0, 0)


def taken(channel, size=LARGE):
    block = torch.empty(size, dtype=torch.uint8)
    channel.recv([block], 0, 0).wait(SECOND)
    return set(block.tolist())


def met(wanted):
    """The channels of every stage of a pipeline."""
    store = HashStore()
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = [pool.submit(connect_neighbours, store, k, len(wanted), want, 20 * SECOND) for k, want in enumerate(wanted)]
        return [future.result() for future in found]


def close(*found):
    for channels in found:
        for channel in channels.values():
            channel.close()


def test_every_two_neighbours_are_connected_in_both_directions():
    found = met([True, True, True])
    assert [sorted(channels) for channels in found] == [[(0, 0), (1, 0)], [(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 1), (1, 1)]]
    for boundary in (0, 1):
        for direction in (0, 1):
            ends = found[boundary][direction, boundary], found[boundary + 1][direction, boundary]
            sender, receiver = ends if direction == 0 else reversed(ends)
            work = message(sender, 10 * boundary + direction)
            assert not work.is_completed()
            assert taken(receiver) == {10 * boundary + direction}
            assert work.is_completed()
    close(*found)


@pytest.mark.parametrize("unwilling", [0, 1])
def test_without_the_consent_of_both_the_group_stays(unwilling):
    found = met([k != unwilling for k in range(3)])
    connected = {boundary for channels in found for _, boundary in channels}
    assert connected == ({1} if unwilling == 0 else set())
    close(*found)


def test_a_caller_that_does_not_know_the_token_is_sent_away():
    store = HashStore()
    with ThreadPoolExecutor(1) as pool, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
        second = pool.submit(connect_neighbours, store, 1, 2, True, 20 * SECOND)
        store.wait(["local/0"], 20 * SECOND)
        stranger.connect("\0" + store.get("local/0").decode()[:-32])
        stranger.sendall(bytes(17))
        first = connect_neighbours(store, 0, 2, True, 20 * SECOND)
        message(first[0, 0], 3)
        assert taken(second.result()[0, 0]) == {3}
        close(first, second.result())


STRANGER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@contextmanager
def stranger(act):
    """Call ``act`` in a process of another user, which then waits for its end."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(STRANGER, STRANGER, STRANGER)
            kept = act()  # noqa: F841  # sockets stay open
            os.write(said, b".")
            signal.pause()
        finally:
            os._exit(0)
    try:
        os.close(said)
        assert os.read(ready, 1) == b"."
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@as_root
def test_a_caller_of_another_user_is_sent_away_though_it_knows_the_token():
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(connect_neighbours, store, 1, 2, True, 20 * SECOND)
        store.wait(["local/0"], 20 * SECOND)
        told = store.get("local/0").decode()

        def call():
            connections = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
            for direction, connection in enumerate(connections):
                connection.connect("\0" + told[:-32])
                connection.sendall(bytes.fromhex(told[-32:]) + bytes([direction]))
            return connections

        with stranger(call):
            first = connect_neighbours(store, 0, 2, True, 20 * SECOND)
            message(first[0, 0], 3)
            assert taken(second.result()[0, 0]) == {3}
        close(first, second.result())


def test_who_cannot_reach_a_neighbour_for_all_the_strangers_goes_by_the_group():
    name = f"pipeoptim-test-{secrets.token_hex(8)}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other,
    ):
        listener.bind("\0" + name)
        listener.listen(0)
        other.connect("\0" + name)
        store = HashStore()
        store.set("local/0", name + "00" * 16)
        assert connect_neighbours(store, 0, 2, True, SECOND) == {}


def test_a_ring_that_is_lost_on_the_way_for_want_of_descriptors_is_told(monkeypatch):
    def without(*arguments, receive=socket.recv_fds):
        greeting, descriptors, _, address = receive(*arguments)
        for fd in descriptors:
            os.close(fd)
        return greeting, [], socket.MSG_CTRUNC if descriptors else 0, address

    monkeypatch.setattr(socket, "recv_fds", without)
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(connect_neighbours, store, 1, 2, True, 20 * SECOND)
        close(first := connect_neighbours(store, 0, 2, True, 20 * SECOND))
        if first[0, 0]._ring is None:
            pytest.skip("no ring on this machine")
        with pytest.raises(OSError, match="Too many open files"):
            second.result()


@as_root
def test_a_listener_of_another_user_is_not_called():
    name = f"pipeoptim-test-{secrets.token_hex(8)}"

    def listen():
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("\0" + name)
        listener.listen(2)
        return listener

    store = HashStore()
    with stranger(listen):
        store.set("local/0", name + "00" * 16)
        assert connect_neighbours(store, 0, 2, True, 20 * SECOND) == {}
    assert store.get("local/0/called") == b"no"


def test_a_neighbour_that_does_not_come_is_named():
    with pytest.raises(StageFailure, match=r"stage 1 did not come within 0.2 s"):
        connect_neighbours(HashStore(), 0, 2, True, timedelta(seconds=0.2))


def test_a_wait_ends_with_the_timeout_and_with_the_peer():
    sender, receiver = (UnixChannel(end) for end in socket.socketpair())
    with pytest.raises(RuntimeError, match="timed out"):
        receiver.recv([torch.empty(8, dtype=torch.uint8)], 0, 0).wait(timedelta(seconds=0.05))
    work = message(sender, 1)
    with pytest.raises(RuntimeError, match="timed out"):
        work.wait(timedelta(seconds=0.05))
    message(sender, 2, 64)
    sender.close()
    assert taken(receiver) == {1}, "what was sent arrives, though its sender has gone"
    assert taken(receiver, 64) == {2}
    with pytest.raises(RuntimeError, match="closed by peer"):
        taken(receiver)
    receiver.close()
    sender, receiver = (UnixChannel(end) for end in socket.socketpair())
    receiver.close()
    for size in (64, LARGE):
        with pytest.raises(RuntimeError, match="closed by peer"):
            message(sender, 1, size)
    sender.close()


def test_a_message_arrives_though_signals_cut_it_up():
    sender, receiver = (UnixChannel(end) for end in socket.socketpair())
    parts, expected = [bytes(range(100)), bytearray(b"x" * 7), b"y" * 300], bytes(range(100)) + b"x" * 7 + b"y" * 300
    for count in (0, 1, 100, 103, 107, 406, 407):
        assert b"".join(bytes(part) for part in _remaining_views(parts, count)) == expected[count:]
    threading.Timer(0.05, sender._socket.sendall, [expected[50:]]).start()
    sender._socket.sendall(expected[:50])
    receiver._socket.settimeout(5)  # so that a read returns what is there
    into = [bytearray(100), bytearray(7), bytearray(300)]
    receiver.get(into, len(expected))
    assert b"".join(into) == expected
    sender.close()
    receiver.close()


def test_blocks_of_other_sizes_are_forgotten_at_both_ends():
    sender, receiver = (UnixChannel(end) for end in socket.socketpair())
    before = len(os.listdir("/proc/self/fd"))
    for n in range(50):
        size = LARGE + n
        block = sender.memory(size)
        for value in (1, 2):
            work = sender.send([block.fill_(value)], 0, 0)
            assert taken(receiver, size) == {value}
            work.wait(SECOND)
    del block
    assert len(receiver._theirs) == len(sender._known) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "descriptors are left open"
    sender.close()
    receiver.close()


def test_another_name_of_a_transport_is_refused():
    with pytest.raises(po.ConfigError, match="transport is 'tcp', must be 'auto'"):
        check_transport("tcp")
