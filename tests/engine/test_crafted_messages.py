"""Messages that another process has put together as it likes: read or refused in a sentence, and no memory is taken on their word."""

import json
import random
import socket

import pytest
import torch

import pipeoptim as po
from pipeoptim.engine.transport import link, message, unix_channel
from pipeoptim.engine.transport.local_link import LocalReceiver
from pipeoptim.engine.transport.unix_channel import UnixChannel

ODD = [
    None, True, -1, 2**40, 2**62, 2**70, 0.5, float("inf"), "", "os:system", "builtins:dict", [], {}, [None], {"dict": [[[], 1]]},
    {"slot": [[2**40], [1], "float32", True]}, {"slot": [[0, 2**63], [1, 1], "float32", True]}, {"slot": [[True], [1], "int8", 0]},
    {"slot": 1}, {"device": "cuda:99999999999"}, {"bytes": "zz"}, {"factory": []}, {"complex": [1]}, {"dtype": "load"},
]  # fmt: skip


def paths(node, path=()):
    yield path
    for key, child in enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ():
        yield from paths(child, (*path, key))


def replaced(node, path, value):
    if not path:
        return value
    made = list(node) if isinstance(node, list) else dict(node)
    made[path[0]] = replaced(node[path[0]], path[1:], value)
    return made


def received(payload, following=None):
    """What a receiver makes of a message that another process has put together as it likes."""
    ours, theirs = socket.socketpair()
    rest = UnixChannel(ours), 1, 1, torch.device("cpu"), 5.0, lambda peer: None
    receiver = LocalReceiver(*rest, ahead=False)
    size = len(payload) if following is None else following
    pack = message._HEADER.pack
    theirs.sendall(pack(message._MAGIC, 0, 0, size, 0, 0.0, 0, 0, 0, 0, 0) + message._PADDING + payload)
    theirs.close()
    try:
        return receiver.receive()
    finally:
        receiver.close()


def crafted(described, form):
    text = json.dumps(described).encode()
    start = -(-len(text) // 64) * 64
    begin = message._HEADER.pack(message._MAGIC, 0, 0, 0, len(text), 0.0, 0, 0, 0, 0, 0) + message._PADDING
    return begin + text.ljust(start, b" ") + bytes(form.payload)


@pytest.mark.parametrize("seed", range(4))
def test_crafted_messages_are_read_or_refused_and_take_no_memory_beyond_their_own(seed, monkeypatch):
    monkeypatch.setattr(link.dist, "get_group_rank", lambda group, rank: rank)
    chance, outcomes = random.Random(seed), set()
    trees = [torch.ones(2, 3), {"a": torch.ones(2), "b": [1, "x", None]}, (torch.ones(1), {"k": (1, 2)}), [torch.ones(3), None]]
    for _ in range(200):
        form, _ = message.format_of(chance.choice(trees))
        described = json.loads(form.describe())
        for _ in range(chance.randrange(3)):
            described = replaced(described, chance.choice(list(paths(described))), chance.choice(ODD))
        try:
            outcomes.add(type(received(crafted(described, form))))
        except po.PipeOptimError as refusal:  # ConfigError, StageFailure
            outcomes.add(type(refusal))
    assert link.Message in outcomes and po.PipeOptimError in outcomes
    for size in (0, 2**40, 2**62, -(2**40)):
        with pytest.raises(po.PipeOptimError):
            received(b"", following=size)


def test_a_block_of_memory_is_what_was_announced():
    ours, theirs = socket.socketpair()
    channel, big = UnixChannel(ours), 1 << 20
    for number, size, new, told in [
        (0, 2**50, True, "of 1125899906842624 bytes came where one of 1048576"),
        (7, big, False, "in block 7, which is not known"),
        (0, big, True, "without its memory"),
    ]:
        theirs.sendall(unix_channel._RECORD.pack(number, size, new) + b"+" * new)
        with pytest.raises(RuntimeError, match=told):
            channel.take(torch.empty(big, dtype=torch.uint8))
        if size != big:
            theirs.setblocking(True)
            ours.recv(1)
    with open("/dev/null") as file:
        theirs.sendall(unix_channel._RECORD.pack(0, big, True))
        socket.send_fds(theirs, [b"+"], [file.fileno()])
        with pytest.raises(RuntimeError, match="cannot be mapped"):
            channel.take(torch.empty(big, dtype=torch.uint8))
    theirs.close()
    channel.close()
