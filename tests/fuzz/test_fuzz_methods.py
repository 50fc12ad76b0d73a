"""Whatever the public methods of exported classes are given: they take it, or one sentence says why not."""

from __future__ import annotations

import inspect
import random
import traceback
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pipeoptim as po
from calls import ODD, Call, Scene, exported, fitting, odd_value
from limits import TooSlowError, amount, bounded, seed

CLASSES = sorted(
    name
    for name, one in exported().items()
    if inspect.isclass(one) and name not in ("InterleavedSchedule", "CombinedOptimizer")
)
FITTING = {
    "k": 0,
    "depth": 2,
    "gap": 1,
    "m": 1,
    "microbatch": 0,
    "args": torch.ones(4, 4),
    "target": torch.zeros(4, 4),
    "losses": None,
    "states": None,
    "batches": [(torch.ones(4, 4), torch.zeros(4, 4))],
}
INTERNAL = {"program", "options", "every", "context", "order", "stage"}
USERS_OWN = {"target", "args", "kwargs"}  # what the modules and the loss_fn of a user make of them


@pytest.fixture(scope="module")
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def methods(cls):
    """The public ones of this project, by name, with their parameters; also those that are inherited. Not those that only the engine
    calls, with what only it has."""
    for name, one in inspect.getmembers(cls, inspect.isroutine):
        if not name.startswith("_") and one.__module__.startswith("pipeoptim"):
            found = [p for p in inspect.signature(one).parameters.values() if p.name not in ("self", "cls")]
            if not INTERNAL.intersection(p.name for p in found):
                yield name, found


def made(name, scene):
    """One that works."""
    call = Call(name)
    for parameter in inspect.signature(exported()[name]).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD and (
            parameter.default is parameter.empty or parameter.kind is parameter.VAR_POSITIONAL
        ):
            values = fitting(name, parameter, scene)
            if parameter.kind is parameter.VAR_POSITIONAL:
                call.args = values
            else:
                call.kwargs[parameter.name] = values[0]
    return call.make()


def fits(parameter, one, scene):
    if parameter.name == "state":
        return one.stage_state_dict(0)
    return FITTING[parameter.name] if parameter.name in FITTING else fitting(type(one).__name__, parameter, scene)[0]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", CLASSES)
def test_a_method_takes_what_it_is_given_or_refuses_it_in_a_sentence(name, process_group, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, wrong = random.Random(seed()), []
    for method, parameters in methods(exported()[name]):
        for odd in (p for p in parameters if p.name not in USERS_OWN):
            for _ in range(amount(8)):
                scene = Scene(tmp_path, tmp_path, rng)
                one, value = made(name, scene), odd_value(odd, rng)
                args, kwargs = [], {}
                for p in parameters:
                    if p is odd:
                        given = value
                    elif p.default is p.empty and p.kind is not p.VAR_KEYWORD:
                        given = fits(p, one, scene)
                    else:
                        continue
                    if p.kind is p.VAR_POSITIONAL:
                        args.append(given)
                    elif p.kind is not p.VAR_KEYWORD:
                        kwargs[p.name] = given
                if "target" in {p.name for p in parameters}:
                    kwargs["target"] = FITTING["target"]
                before = scene.weights()
                try:
                    with bounded(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        getattr(one, method)(*args, **kwargs)
                except po.PipeOptimError as error:
                    moved = any(not torch.equal(a, b) for a, b in zip(before, scene.weights(), strict=True))
                    if moved or len(str(error).splitlines()) != 1:
                        wrong.append(
                            f"{method}({odd.name}={value!r}): {'weights had moved' if moved else 'not one line'}: {error}"
                        )
                except (Exception, TooSlowError):
                    wrong.append(f"{method}({odd.name}={value!r}):\n{traceback.format_exc(limit=-3)}")
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong)


def test_methods_are_found():
    assert {"step", "evaluate", "version_gap"} <= {name for name, _ in methods(po.Emulator)}
    assert all(callable(make) for make in ODD) and not list(methods(nn.Linear))
