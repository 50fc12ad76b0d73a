"""What a profile measures: on a clock of our own, so that every second of it is known."""

import importlib

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.partitioning import profile

F, B, NEW = [1.0, 2.0, 4.0, 3.0], [2.0, 6.0, 5.0, 1.0], 100.0


class Clock:
    """Stands still but for what layers take; ``speed`` by number of the run since the start."""

    def __init__(self):
        self.now, self.log, self.speeds = 0.0, [], {}

    def perf_counter(self):
        return self.now

    def takes(self, what, n, seconds):
        self.log.append((what, n))
        self.now += seconds * self.speeds.get(sum(entry == (what, n) for entry in self.log) - 1, 1.0)


clock = Clock()  # of the module, since layers are copied into stages


@pytest.fixture(autouse=True)
def own_clock(monkeypatch):
    clock.__init__()
    for module in ("profile", "measure"):
        monkeypatch.setattr(importlib.import_module(f"pipeoptim.partitioning.{module}"), "time", clock)


class Takes(torch.autograd.Function):
    """A backward of so many seconds, and many more if it adds to an old gradient or makes one that nobody wants."""

    @staticmethod
    def forward(ctx, x, weight, n):
        ctx.n, ctx.weight = n, weight
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        old = ctx.weight.grad is not None
        unwanted = ctx.n == 0 and ctx.needs_input_grad[0]
        clock.takes("B", ctx.n, B[ctx.n] + NEW * (old + unwanted))
        return gradient, torch.ones_like(ctx.weight), None


class Layer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n, self.weight = n, nn.Parameter(torch.ones(()))

    def forward(self, x):
        clock.takes("F", self.n, F[self.n])
        return Takes.apply(x, self.weight, self.n)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(n) for n in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


MODELS = {"blocks": lambda: nn.Sequential(*(Layer(n) for n in range(4))), "layers": Net}


@pytest.mark.parametrize("how", MODELS)
def test_a_stage_takes_what_was_predicted_for_it(how):
    model, x = MODELS[how](), torch.ones(3)
    for p in model.parameters():
        p.grad = torch.ones(())  # of a training under way
    clock.speeds = {2: 50.0, 5: 0.1}  # two of the runs are disturbed
    cut = po.partition(model, 3, (x,))
    assert [cost.forward for cost in cut.costs[:4]] == pytest.approx(F)
    assert [cost.backward for cost in cut.costs[:4]] == pytest.approx(B)
    assert cut.seconds == pytest.approx([11.0, 9.0, 4.0])
    assert all(p.grad == 1 for p in model.parameters())
    value = (x,)
    for predicted, stage in zip(cut.seconds, cut.stages, strict=True):
        stage.zero_grad()
        start = clock.now
        out = stage(*value)
        out = out if isinstance(out, tuple) else (out,)
        out[0].sum().backward()
        assert clock.now - start == pytest.approx(predicted)
        value = (out[0].detach().requires_grad_(), *out[1:])


def test_all_other_blocks_run_between_two_turns_of_a_block():
    profile([Layer(n) for n in range(3)], (torch.ones(3),), "abc", repeats=2)
    assert clock.log == [(what, n) for n in range(3) for what in "FB"] * 3


def test_blocks_that_work_in_place_are_measured_and_leave_the_sample_as_it_was():
    x = torch.full((2, 4), -1.0)
    blocks = [nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)]
    cut = po.partition(nn.Sequential(*blocks), 3, (x,))
    assert len(cut.stages) == 3 and torch.equal(x, torch.full((2, 4), -1.0))


def test_what_needs_no_gradient_gets_no_backward():
    frozen = [nn.Linear(4, 4).requires_grad_(False), nn.ReLU()]
    seen = []

    class Last(nn.Linear):
        def forward(self, x):
            seen.append(x.requires_grad)
            return super().forward(x)

    profile([*frozen, Last(4, 2)], (torch.ones(2, 4),), "abc", repeats=1)
    assert seen == [False, False]
