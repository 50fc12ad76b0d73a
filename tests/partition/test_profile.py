"""What a profile measures: on a clock of our own, so that every second of it is known."""

import importlib

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.partitioning import profile

F, B = [1.0, 2.0, 4.0, 3.0], [2.0, 6.0, 5.0, 1.0]  # seconds of layers, for 4 rows
CALL, ADD, UNWANTED = 0.5, 10.0, 100.0  # of any forward, of adding to a gradient, of making one that nobody wants


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
    for module in ("block_costs", "phase_costs"):
        monkeypatch.setattr(importlib.import_module(f"pipeoptim.partitioning.{module}"), "time", clock)


class Takes(torch.autograd.Function):
    """A backward of so many seconds."""

    @staticmethod
    def forward(ctx, x, weight, n):
        ctx.n, ctx.weight, ctx.rows = n, weight, len(x)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        old = ctx.weight.grad is not None
        unwanted = ctx.n == 0 and ctx.needs_input_grad[0]
        clock.takes("B", ctx.n, B[ctx.n] * ctx.rows / 4 + ADD * old + UNWANTED * unwanted)
        return gradient, torch.ones_like(ctx.weight), None


class Layer(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.n, self.weight = n, nn.Parameter(torch.ones(()))

    def forward(self, x):
        clock.takes("F", self.n, F[self.n] * len(x) / 4 + CALL)
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
@pytest.mark.parametrize("m", [1, 2])
def test_a_stage_takes_what_was_predicted_for_it(how, m):
    model, x = MODELS[how](), torch.ones(4)
    for p in model.parameters():
        p.grad = torch.ones(())  # of a training under way
    clock.speeds = {2: 50.0, 9: 0.1}  # two of the runs are disturbed
    cut = po.partition(model, 3, (x,), microbatches=m)
    assert [cost.forward for cost in cut.costs[:4]] == pytest.approx([seconds + m * CALL for seconds in F])
    assert [cost.backward for cost in cut.costs[:4]] == pytest.approx([seconds + (m - 1) * ADD for seconds in B])
    assert [cost.output_bytes for cost in cut.costs[:4]] == [16] * 4
    assert cut.lengths[:2] == [2, 1]
    assert all(p.grad == 1 for p in model.parameters())
    value = (x[: 4 // m],)
    for predicted, stage in zip(cut.seconds, cut.stages, strict=True):
        stage.zero_grad()
        start = clock.now
        for _ in range(m):
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


@pytest.mark.parametrize("how", ["blocks", "layers"])
def test_what_all_microbatches_get_whole_is_measured_whole(how):
    rows = []

    class Masked(nn.Linear):
        def forward(self, x, mask):
            rows.append((len(x), len(mask)))
            return super().forward(x * mask.sum())

    model = nn.Sequential(Masked(3, 3), nn.Linear(3, 3))
    if how == "layers":
        model = Outer(model)
    cut = po.partition(model, 2, (torch.ones(6, 3), po.Whole(torch.ones(5))), how=how, microbatches=3)
    assert (2, 5) in rows and len(cut.stages) == 2 and not any(mask != 5 for _, mask in rows)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, mask):
        return self.inner[1](self.inner[0](x, mask))


def test_what_needs_no_gradient_gets_no_backward():
    frozen = [nn.Linear(4, 4).requires_grad_(False), nn.ReLU()]
    seen = []

    class Last(nn.Linear):
        def forward(self, x):
            seen.append(x.requires_grad)
            return super().forward(x)

    profile([*frozen, Last(4, 2)], (torch.ones(2, 4),), "abc", repeats=1)
    assert seen == [False, False]
