"""``synchronous_updates``: every asynchronous method begins as 1F1B with a flush, bit for bit, and then goes on by itself."""

import copy

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.schedule import ORDERS

mse = nn.functional.mse_loss
ASYNCHRONOUS = [name for name, method in sorted(po.METHODS.items()) if not ORDERS[method.order].flushes]


def pipeline(method, m, **options):
    torch.manual_seed(3)
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.Tanh()) for _ in range(3)]
    make = lambda p: torch.optim.AdamW(p, lr=0.02)  # noqa: E731
    rates = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    return stages, po.Emulator(stages, make, mse, method, m, schedulers=rates, seed=1, clip=1.0, **options)


def data(count):
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 6, 6, generator=g)) for _ in range(count)]


def weights(stages):
    return torch.cat([p.detach().flatten() for stage in stages for p in stage.parameters()])


CASES = [(name, m, {}) for name in ASYNCHRONOUS for m in (1, 3) if m == 3 or not po.METHODS[name].at_least_depth_microbatches]
CASES += [(name, 3, {"prediction": "in_progress"}) for name in ("pipeoptim", "pipeoptim_stash")]


@pytest.mark.parametrize(("method", "m", "options"), CASES)
def test_the_first_updates_are_those_of_1f1b_and_a_resumed_run_is_the_undisturbed_one(method, m, options):
    options = {"synchronous_updates": 4, **options}
    (stages, pipe), (plain, flushing) = pipeline(method, m, **options), pipeline("1f1b", m)
    states = {}
    for n, (x, y) in enumerate(data(10)):
        pipe.step(x, target=y)
        flushing.step(x, target=y)
        assert torch.equal(weights(stages), weights(plain)) == (n < 4), n
        if n in (1, 6):
            pipe.drain()
            states[n] = copy.deepcopy([pipe.stage_state_dict(k) for k in range(3)])
    pipe.drain()
    for n, saved in states.items():
        others, resumed = pipeline(method, m, **options)
        for k in range(3):
            resumed.load_stage_state_dict(k, saved[k])
        for number, (x, y) in enumerate(data(10)):
            if number > n:
                resumed.step(x, target=y)
            if number == 6:  # drained in the undisturbed run, too
                resumed.drain()
        resumed.drain()
        assert torch.equal(weights(stages), weights(others)), n


def test_it_is_refused_where_it_means_nothing_and_where_it_is_given_twice():
    with pytest.raises(po.ConfigError, match="synchronous_updates is 3, but method '1f1b' never trains asynchronously"):
        pipeline("1f1b", 2, synchronous_updates=3)
    with pytest.raises(
        po.ConfigError, match="synchronous_updates is 3, but method 'pipemare.*' has 5 of its own; give it once"
    ):
        pipeline("pipemare(synchronous_updates=5)", 1, synchronous_updates=3)
    for bad in (-1, 2.5, True):
        with pytest.raises(po.ConfigError, match=f"synchronous_updates is {bad}, must be an integer of at least 0"):
            pipeline("pipeoptim", 1, synchronous_updates=bad)
