"""Connections that are cut to end a wait: those that this process has opened, and not those of others to a store that it serves."""

import socket

import pytest
import torch.distributed as dist

from pipeoptim.engine.processes.opened_sockets import OpenedSockets
from pipeoptim.engine.processes.rendezvous import Rendezvous


def connected(listener):
    ours = socket.create_connection(listener.getsockname())
    return ours, listener.accept()[0]


def is_open(end):
    end.settimeout(0.2)
    try:
        return end.recv(1) != b""
    except TimeoutError:
        return True


@pytest.mark.parametrize("served", [True, False])
def test_what_others_have_opened_to_the_served_port_stays(served):
    with socket.create_server(("127.0.0.1", 0)) as store, socket.create_server(("127.0.0.1", 0)) as group:
        opened = OpenedSockets(store.getsockname()[1] if served else None)
        theirs = socket.create_connection(store.getsockname())  # of another process
        with opened:
            accepted = store.accept()[0]
            pair = connected(group)
        opened.shut_down()
        assert is_open(theirs) == is_open(accepted) == served
        assert not any(map(is_open, pair))
        for end in (theirs, accepted, *pair):
            end.close()


def test_the_port_of_the_store_is_found_below_its_prefixes():
    """In the process that holds the store, others connect to it while this one makes its groups."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("run", store), rank=0, world_size=1)
    try:
        assert Rendezvous("test", [0], 5)._sockets._served == store.port
    finally:
        dist.destroy_process_group()
