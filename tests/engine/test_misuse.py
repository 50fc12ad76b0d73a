"""Mistakes that users make in a script: one sentence that says what was given and what to give instead."""

import pytest
import torch
from torch import nn

import pipeoptim as po

x = torch.ones(4, 4)


def emulator(loss_fn=nn.functional.mse_loss, **options):
    stages = [nn.Linear(4, 4) for _ in range(2)]
    return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), loss_fn, **options)


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


CASES = {
    "step without target": (lambda _: emulator().step(x), r"loss_fn failed without a target \(.*step\(\.\.\., target=y\)"),
    "eval_step without target": (lambda _: emulator().eval_step(x), "loss_fn failed without a target"),
    "no loss function": (lambda _: emulator(None), "loss_fn is None, must be a function of output and target"),
    "seed that is text": (lambda _: emulator(seed="a"), "seed is 'a', must be an integer, or None"),
    "seed that is a float": (lambda _: emulator(seed=1.5), "seed is 1.5, must be an integer"),
    "no list of pins": (lambda _: po.partition(model(), 2, (x,), pins=None), "pins is None, must be a list .* leave it out"),
    "pins that are one name": (lambda _: po.partition(model(), 2, (x,), pins="1"), "pins is '1', must be a list"),
    "weights of a module": (
        lambda f: po.save_weights(model(), f / "w"),
        r"save_weights\(\) was given a Sequential, must .* pipeline",
    ),
    "state of a module": (
        lambda _: po.full_state_dict(model()),
        r"full_state_dict\(\) was given a Sequential, must .* pipeline",
    ),
    "checkpoint of a module": (lambda f: po.save_sharded(model(), f / "s"), r"save_sharded\(\) was given a Sequential"),
    "checkpoint into a module": (lambda f: po.load_sharded(model(), f / "s"), r"load_sharded\(\) was given a Sequential"),
    "weights into a pipeline": (
        lambda f: po.load_weights(emulator(), f),
        r"load_weights\(\) was given an object of type Emulator, .* pipe.stage_module",
    ),
    "ties of a number": (lambda _: po.untie(3), r"untie\(\) was given 3, must be given the list"),
    "ties of numbers": (lambda _: po.untie([3]), r"untie\(\) was given \[3\], must be given the list"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_a_sentence(case, tmp_path):
    work, words = CASES[case]
    with pytest.raises(po.ConfigError, match=words) as told:
        work(tmp_path)
    assert len(str(told.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_needs_no_target_gets_none_and_its_own_errors_stay_its_own():
    assert emulator(lambda out, target: out.square().mean()).step(x) > 0
    with pytest.raises(TypeError, match="unsupported operand"):
        emulator(lambda out, target: out + {}).step(x, target=x)
