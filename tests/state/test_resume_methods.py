"""A run that was saved and taken up again is, bit for bit, the run that went on: for every method, whoever steps the weights."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import pipeoptim as po
import state_case
from pipeoptim.engine import PredictionWarning

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.02),
    "muon_adamw": lambda p: po.muon_adamw(p, lr=0.01),
    "displacement": lambda p: torch.optim.AdamW([{"params": list(p), "prediction": "displacement"}], lr=0.02),
}
DEPTH, BEFORE, AFTER = 4, 5, 5


def pipeline(method, optimizer, microbatches):
    stages = state_case.cut(DEPTH, dropout=0.1)
    options = {"schedulers": state_case.schedule, "seed": 5}
    return po.Emulator(stages, OPTIMIZERS[optimizer], nn.functional.cross_entropy, method, microbatches, **options)


def is_not_compensated(method, optimizer):
    """Whether the method's correction for delay has no formula for this optimizer, and says so to a plain one as well."""
    compensated = po.METHODS[method].compensated
    try:
        compensated(OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(2, 2))]))
    except po.ConfigError:
        return True
    return False


def train(pipe, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PredictionWarning)
        for n in steps:
            x, y = state_case.batch(n)
            pipe.step(x, target=y)
        pipe.drain()


def saved(pipe):
    """What a checkpoint of a run holds: the states of the stages, through a file."""
    file = io.BytesIO()
    torch.save([pipe.stage_state_dict(k) for k in range(DEPTH)], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(pipe, states):
    for k, state in enumerate(copy.deepcopy(states)):  # optimizers keep what they load
        pipe.load_stage_state_dict(k, state)


def weights(pipe):
    return [t.clone() for k in range(DEPTH) for t in pipe.stage_module(k).state_dict().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), b, strict=True))


@pytest.mark.parametrize("microbatches", [1, DEPTH])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", po.METHODS)
def test_a_resumed_run_equals_the_one_that_went_on(method, optimizer, microbatches):
    try:
        pipe = pipeline(method, optimizer, microbatches)
    except po.ConfigError:
        asks_for_more = po.METHODS[method].at_least_depth_microbatches and microbatches < DEPTH
        assert asks_for_more or is_not_compensated(method, optimizer)
        return
    begun = saved(pipe)
    train(pipe, range(BEFORE))
    states = saved(pipe)
    train(pipe, range(BEFORE, BEFORE + AFTER))
    went_on = weights(pipe)
    resumed = pipeline(method, optimizer, microbatches)
    load(resumed, states)
    train(resumed, range(BEFORE, BEFORE + AFTER))
    assert same(resumed, went_on)
    load(pipe, states)  # a run that goes back to its own checkpoint
    train(pipe, range(BEFORE, BEFORE + AFTER))
    assert same(pipe, went_on)
    load(pipe, begun)
    train(pipe, range(BEFORE))
    train(pipe, range(BEFORE, BEFORE + AFTER))
    assert same(pipe, went_on), "from the very beginning, when no copy of the weights had been needed yet"


def test_a_state_in_memory_stays_as_it_was_when_training_goes_on_from_it():
    """Torch's optimizers take over the tensors that they load, so that a second return to the same state met what the first had changed."""
    pipe = pipeline("pipeoptim", "adamw", 1)
    train(pipe, range(BEFORE))
    states = copy.deepcopy([pipe.stage_state_dict(k) for k in range(DEPTH)])
    found = []
    for _ in range(2):
        for k, state in enumerate(states):
            pipe.load_stage_state_dict(k, state)
        train(pipe, range(BEFORE, BEFORE + AFTER))
        found.append(weights(pipe))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
