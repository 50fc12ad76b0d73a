"""Seconds of blocks inside a stage: marks are told apart exactly, and in training each block gets its own time."""

import pytest
import torch
from torch import nn

from pipeoptim.bench.block_seconds import _split, traced_blocks
from pipeoptim.bench.measured_model import MeasuredModel
from pipeoptim.bench.other_work import OtherWork
from pipeoptim.errors import ConfigError

S = 10**9


def test_marks_are_split_as_by_hand():
    forward = [["block F", n, at * S, at * S, -1, 0] for n, at in enumerate((3, 4, 9))] + [["F", 0, 1 * S, 10 * S, -1, 0]]
    # Block 1 has two outputs; that whose gradient is complete first counts. Block 0 returns no tensor with a gradient.
    backward = [["block B", n, at * S, at * S, -1, 0] for n, at in ((2, 11), (1, 14), (1, 16))] + [
        ["B", 0, 10 * S, 20 * S, -1, 0]
    ]
    update = [["U", 0, 20 * S, 21 * S, -1, 0]]
    assert _split([*forward, *backward, *update], 3) == ([[2, 1, 6]], [[0, 6, 4]])
    with pytest.raises(ConfigError, match="called 2 of its 3 blocks"):
        _split(forward[1:], 3)


class Clock:
    """Stands still but for what blocks take."""

    at = 0

    def now(self):
        return Clock.at

    def nanoseconds(self, moment):
        return moment


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, seconds):
        ctx.seconds = seconds
        Clock.at += seconds * S
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        Clock.at += 2 * ctx.seconds * S
        return gradient, torch.zeros(1), None


class Takes(nn.Module):
    """Takes so many seconds, and twice as many back; hands on its input as well."""

    def __init__(self, seconds):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.ones(1)), seconds

    def forward(self, x, *others):
        return Slow.apply(x, self.weight, self.seconds), x, *others[:1]


class Chain(nn.Sequential):
    def forward(self, *xs):
        for block in self:
            xs = block(*xs)
        return xs


@pytest.mark.parametrize("m", [1, 2])
def test_every_block_gets_its_own_time(m, monkeypatch):
    monkeypatch.setattr("pipeoptim.engine.trace.HostTraceClock", Clock)
    twice = Takes(4)
    blocks = [Takes(1), twice, Takes(8), twice]  # a module may be two blocks
    x = torch.ones(2, 3)
    work = MeasuredModel("waits", Chain(*blocks), (x,), 2, lambda p: torch.optim.SGD(p, lr=0.0), lambda out, _: out[0].sum(), x)
    assert traced_blocks(work.model, blocks, work, m, 5) == ([1, 4, 8, 4], [2, 8, 16, 8], 0)


def test_other_work_is_what_others_take():
    with OtherWork() as other:
        sum(range(1000))
    assert 0 <= other.cores < 1000
