"""Whatever a constructor is given, it makes a pipeline or says in one sentence why not."""

import random
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage

import pipeoptim as po
from pipeoptim.options import OPTIONS, PROCESS_OPTIONS

MOST_SECONDS = 10


def fails(*_):
    return 1 / 0


JUNK = [
    None,
    0,
    1,
    -1,
    3,
    10**9,
    2.5,
    float("nan"),
    float("inf"),
    "x",
    "",
    b"b",
    True,
    False,
    [],
    {},
    (),
    [None],
    [1, 2],
    {"a": 1},
]
JUNK += [object(), len, int, nn.Linear, nn.Linear(2, 2), torch.ones(2), torch.float32, range(10**12), lambda *_: None, fails]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def arguments(rng, good, names):
    """Those of a pipeline that works, with up to two of them replaced by something else."""
    given = {name: make() for name, make in good.items()}
    return given | {name: rng.choice(JUNK) for name in rng.sample(names, rng.choice([0, 1, 1, 2]))}


def refused(pipeline, given):
    try:
        pipeline(**given).close()
    except po.ConfigError as error:
        return str(error)
    return ""


def outcomes(calls, seed, pipeline, good, names):
    rng, found = random.Random(seed), {True: 0, False: 0}
    for _ in range(calls):
        given = arguments(rng, {**good, "method": lambda: rng.choice([*po.METHODS])}, names)
        began = time.process_time()  # of this process: others may be busy
        refusal = refused(pipeline, given)
        assert len(refusal.splitlines()) <= 1, given
        found[not refusal] += 1
        assert time.process_time() - began < MOST_SECONDS, given
    return found


@pytest.mark.parametrize("seed", range(4))
def test_an_emulator_is_made_or_refused(seed):
    good = {
        "stages": lambda: [nn.Linear(2, 2), nn.Linear(2, 2)],
        "optimizers": lambda: sgd,
        "loss_fn": lambda: nn.functional.mse_loss,
        "microbatches": lambda: 2,
    }
    names = [*good, "method", "schedulers", "processes", *OPTIONS]
    found = outcomes(250, seed, po.Emulator, good, names)
    assert min(found.values()) > 10


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_schedule_is_made_or_refused(alone):
    module = nn.Linear(2, 2)
    good = {
        "stage": lambda: PipelineStage(module, 0, 1, torch.device("cpu")),
        "optimizer": lambda: sgd(module.parameters()),
        "loss_fn": lambda: nn.functional.mse_loss,
        "microbatches": lambda: 2,
    }
    found = outcomes(100, 0, po.Schedule, good, [*good, "method", "scheduler", *PROCESS_OPTIONS])
    assert min(found.values()) > 10


def test_an_interleaved_schedule_is_refused(alone):
    stage = PipelineStage(nn.Linear(2, 2), 0, 1, torch.device("cpu"))
    good = {"stages": lambda: [stage, stage], "optimizers": lambda: [None, None], "loss_fn": lambda: nn.functional.mse_loss}
    found = outcomes(50, 0, po.InterleavedSchedule, good, [*good, "method", "schedulers", *PROCESS_OPTIONS])
    assert found == {True: 0, False: 50}  # one process cannot interleave


@pytest.mark.parametrize("given", [None, 3, "ab", range(10**12), iter([nn.Linear(2, 2), 5])])
def test_stages_that_are_no_modules_are_refused(given):
    with pytest.raises(po.ConfigError, match="must be a list of modules|must be a torch.nn.Module"):
        po.Emulator(given, sgd, nn.functional.mse_loss)


def test_a_function_that_fails_is_named_and_its_error_is_the_cause():
    with pytest.raises(po.ConfigError, match="optimizers is a function that failed for stage 0: ZeroDivisionError: ") as told:
        po.Emulator([nn.Linear(2, 2)], fails, nn.functional.mse_loss)
    assert isinstance(told.value.__cause__, ZeroDivisionError)
