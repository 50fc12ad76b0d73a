"""Messages between stages: every structure arrives as it was, a new format costs one message more, an old one none."""

import builtins
import json
import pickle
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from enum import IntEnum

import pytest
import torch

import pipeoptim as po
from pipeoptim.engine.transport import link, message
from pipeoptim.engine.transport.pytree import transferred

Pair = namedtuple("Pair", "first second")


@dataclass
class Registered:
    first: object
    second: object


class Colour(IntEnum):
    RED = 1


torch.utils._pytree.register_dataclass(Registered)


def through(tree):
    form, tensors = message.format_of(tree)
    other = message.Format.parse(form.describe())
    block = torch.zeros(other.size, dtype=torch.uint8)
    message.fill(message.places(block, message.HEADER, form), tensors)
    return message.read(block, message.HEADER, other)


x = torch.randn(2, 3, 4, 5, requires_grad=True)
TREES = [
    x,
    (x, None, {"mask": x > 0, 3: [x.detach(), 2.5]}, "text", True),
    Pair(x.transpose(1, 2), OrderedDict(a=x.argmax(-1), b=torch.empty(0, 4))),
    [x.to(memory_format=torch.channels_last), torch.tensor(3), torch.ones(1, 3).expand(4, 3)],
    (
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64),
        torch.float16,
        torch.device("cpu"),
        b"x",
        2**70,
    ),
    {"nested": defaultdict(list, a=[x]), (1, None): deque([x.detach()], maxlen=3), 2.5: Registered(x, "two")},
    [float("inf"), -0.0, complex(1, float("-inf")), torch.channels_last, torch.strided, "\ud800", torch.max(torch.eye(2), 0)],
]


@pytest.mark.parametrize("tree", TREES)
def test_a_tree_arrives_as_it_was_by_message_and_in_the_emulator(tree):
    for arrived in (through(tree), transferred(tree)):
        ours, spec = torch.utils._pytree.tree_flatten(tree)
        theirs, other = torch.utils._pytree.tree_flatten(arrived)
        assert spec == other
        for a, b in zip(ours, theirs, strict=True):
            assert type(b) is (torch.Tensor if isinstance(a, torch.Tensor) else type(a))
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad and b.grad_fn is None
            else:
                assert a == b


@pytest.mark.parametrize(
    "leaf", [{1, 2}, torch.eye(2).to_sparse(), torch.ones(2, device="meta"), slice(1), object(), Colour.RED]
)
def test_what_cannot_be_sent_is_refused_by_both_engines(leaf):
    for send in (message.format_of, transferred):
        with pytest.raises(po.ConfigError, match="cannot be sent to the next stage"):
            send((torch.ones(1), leaf))


def test_a_class_that_the_next_process_cannot_find_is_refused():
    local = namedtuple("local", "a")
    with pytest.raises(po.ConfigError, match="define its class at the top of a module"):
        message.format_of(local(torch.ones(1)))[0].describe()


def test_a_class_that_this_process_does_not_know_is_named_and_not_imported():
    text = message.format_of(Pair(torch.ones(1), None))[0].describe()
    unknown = text.replace(Pair.__module__.encode(), b"this")  # a module of Python's that prints when it is imported
    with pytest.raises(po.ConfigError, match="class Pair, which this one does not know; import this in all processes"):
        message.Format.parse(unknown)
    assert "this" not in sys.modules
    for name in ("os:system", "builtins:eval", "torch:load", "subprocess:Popen"):
        for node in (["collections:namedtuple", name, [None]], [name, None, [None]]):
            with pytest.raises(po.ConfigError, match="does not know"):
                message.Format.parse(json.dumps([node, [None]]).encode())


def test_a_pickle_is_not_a_description(tmp_path):
    class Planted:
        def __reduce__(self):
            return builtins.open, (str(tmp_path / "was-here"), "w")

    with pytest.raises(po.PipeOptimError, match="no valid description"):
        message.Format.parse(pickle.dumps((Planted(), 0)))
    assert not (tmp_path / "was-here").exists()


def slot(shape, stride, dtype="float32"):
    return json.dumps([None, [{"slot": [shape, stride, dtype, False]}]]).encode()


@pytest.mark.parametrize(
    "text",
    [
        slot([2, 2], [100, 1]),
        slot([2], [0]),
        slot([-2], [1]),
        slot([2], [1, 1]),
        slot([2.5], [1]),
        b"",
        b"[]",
        b"\xff",
        b"[" * 100000,
        json.dumps([None, []]).encode(),
        json.dumps([["builtins:tuple", None, [None]], [1, 2]]).encode(),
        json.dumps([None, [{"made": "up"}]]).encode(),
    ],
)
def test_a_damaged_description_is_refused(text):
    with pytest.raises(po.PipeOptimError, match="no valid description"):
        message.Format.parse(text)


def test_a_type_of_another_version_of_torch_is_refused():
    with pytest.raises(po.ConfigError, match="'float3', which is no dtype of this version of torch"):
        message.Format.parse(slot([2], [1], "float3"))


def test_a_parsed_format_equals_the_senders():
    form, _ = message.format_of(TREES[2])
    parsed = message.Format.parse(form.describe())
    assert parsed == form and parsed.slots == form.slots and parsed.size == form.size


def test_a_format_is_described_only_when_it_changes(monkeypatch):
    class Done:
        def is_completed(self):
            return True

        def wait(self, timeout):
            pass

    class Group:
        def send(self, blocks, place, tag):
            sizes.append(blocks[0].numel())
            return Done()

    sizes = []
    monkeypatch.setattr(link.dist, "get_group_rank", lambda group, rank: rank)
    sender = link.Sender(Group(), 1, 1, torch.device("cpu"), 1.0, lambda peer: None)
    for tree, messages in (
        (torch.ones(4, 3), 2),
        (torch.zeros(4, 3), 1),
        (torch.ones(4, 3), 1),
        (torch.ones(5, 3), 2),
        (None, 2),
    ):
        before = len(sizes)
        sender.send(tree)
        assert len(sizes) - before == messages
    assert sizes[2] == message.HEADER + 64, "header and payload, nothing else"
