"""The code of a mini-batch is noted once, then prefetched after every computation; nothing else changes."""

import sys

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim.engine.runner import StageRunner
from pipeoptim.kernels import calls


def _trained(updates):
    torch.manual_seed(0)
    stages = [nn.Linear(3, 3) for _ in range(2)]
    pipe = po.Emulator(stages, lambda p: torch.optim.AdamW(p, lr=0.1), nn.functional.mse_loss, microbatches=2)
    for n in range(updates):
        pipe.step(torch.full((4, 3), float(n)), target=torch.ones(4, 3))
    return pipe, [p.detach().clone() for stage in stages for p in stage.parameters()]


def test_the_code_of_one_mini_batch_is_prefetched_from_then_on(monkeypatch):
    noted, made = [], calls.CachePrefetch.__init__
    monkeypatch.setattr(calls.CachePrefetch, "__init__", lambda self, them: made(self, noted.append(list(them)) or noted[-1]))
    pipe, weights = _trained(12)
    workers = [runner.worker for runner in pipe._runners.values()]
    assert sys.getprofile() is None and all(isinstance(w.prefetch_code, calls.CachePrefetch) for w in workers)
    (seen,) = [them for them in noted if StageRunner.forward.__code__ in them]
    assert StageRunner.backward.__code__ in seen and any(one is workers[1] for one in seen)
    lines, each = workers[0].prefetch_code._lines, workers[0].prefetch_code._count
    assert len(set(memoryview(lines).cast("Q"))) == each > len(seen)

    profiler = lambda *_: None  # noqa: E731  # whose place would be taken
    sys.setprofile(profiler)
    try:
        pipe, others = _trained(12)
        assert sys.getprofile() is profiler
    finally:
        sys.setprofile(None)
    assert all(runner.worker.prefetch_code is None for runner in pipe._runners.values())
    assert all(map(torch.equal, weights, others))


def _about_to_be_recorded():
    pipe, _ = _trained(1)
    while pipe._until_recorded != 1:
        pipe.step(torch.ones(4, 3), target=torch.ones(4, 3))
    return pipe


def test_a_mini_batch_that_fails_ends_the_recording():
    pipe = _about_to_be_recorded()
    with pytest.raises(RuntimeError):
        pipe.step(torch.ones(4, 7), target=torch.ones(4, 3))
    assert sys.getprofile() is None


@pytest.mark.parametrize(("functions", "prefetched"), [(100, True), (3000, False)])
def test_a_mini_batch_in_which_a_compiler_ran_is_no_example_of_others(functions, prefetched):
    pipe, once = _about_to_be_recorded(), [eval("lambda: None") for _ in range(functions)]
    pipe._runners[0].worker.module.register_forward_pre_hook(lambda *_: [call() for call in once] and None)
    pipe.step(torch.ones(4, 3), target=torch.ones(4, 3))
    assert sys.getprofile() is None
    assert all((runner.worker.prefetch_code is not None) == prefetched for runner in pipe._runners.values())
