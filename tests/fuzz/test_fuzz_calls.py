"""Whatever the exported functions and classes are given: they take it, or one sentence says why not, before any weight has moved."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pipeoptim as po
from calls import ODD, Call, Scene, draw, exported, fitting
from limits import TooSlowError, amount, bounded, seed
from pipeoptim.engine.pipeline import Pipeline
from pipeoptim.methods import registry as methods_registry
from pipeoptim.rules import registry as rules_registry


class OwnRule(rules_registry.Rule):
    """Weights stay."""

    exact, source = "always", "this test"

    def move(self, weight, state, grad, group, ahead):
        return None


CALLS, PARTS = 2000, 5
NAMES = sorted(exported())
PIPELINES = [name for name in NAMES if isinstance(getattr(po, name), type) and issubclass(getattr(po, name), Pipeline)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a checkpoint, weights and a trace."""
    folder = tmp_path_factory.mktemp("saved")
    trace = po.Trace()
    pipe = Scene(folder, folder, random.Random(0)).pipe(trace=trace)
    pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
    pipe.drain()
    po.save_sharded(pipe, folder / "sharded").result()
    po.save_weights(pipe, folder / "weights")
    trace.save(folder / "trace")
    return folder


@pytest.fixture(scope="module")
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def registries():
    """As they were."""
    kept = [(registry, dict(registry)) for registry in (methods_registry._methods, rules_registry.RULES)]
    yield
    for registry, content in kept:
        registry.clear()
        registry.update(content)


def use(made: object, scene: Scene) -> None:
    """What was made works, or refuses to before it moves weights."""
    if isinstance(made, contextlib.AbstractContextManager) and not isinstance(made, Pipeline):
        with made:
            pass
    if inspect.isfunction(made):  # register_rule
        made(OwnRule)
    option = {po.Clip: "clip", po.Compression: "compress", po.Trace: "trace", po.Method: "method"}.get(type(made))
    if option:
        made = scene.pipe(**{option: made})
    if not isinstance(made, Pipeline):
        return
    try:
        made.step(torch.ones(4, 4), target=torch.zeros(4, 4))
        made.step(torch.ones(4, 4), target=torch.zeros(4, 4))
        made.drain()
    finally:
        if not isinstance(made, po.Emulator):
            made.close()


def complaint(call: Call, scene: Scene) -> str:
    """What is wrong with how a call ended; empty for nothing."""
    before = scene.weights()
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use(call.make(), scene)
    except po.PipeOptimError as error:
        if any(not torch.equal(a, b) for a, b in zip(before, scene.weights(), strict=True)):
            return f"weights had moved before: {error}"
        return "" if len(str(error).splitlines()) == 1 else f"not one line: {error}"
    except TooSlowError:
        return "took too long\n" + traceback.format_exc()
    except BaseException:
        return traceback.format_exc()
    return ""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_call_is_carried_out_or_refused_in_a_sentence(part, saved, process_group, registries, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(1000 * seed() + part)
    wrong = []
    for n in range(amount(CALLS) // PARTS):
        folder = Path(str(n))
        folder.mkdir()
        scene = Scene(folder, saved, rng)
        # Every other one is a constructor of a pipeline, which has the most arguments.
        call = draw(PIPELINES[n // 2 % len(PIPELINES)] if n % 2 else NAMES[n // 2 % len(NAMES)], scene)
        if found := complaint(call, scene):
            wrong.append(f"{call}\n{found}")
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong)


IMPOSSIBLE_HERE = {
    "InterleavedSchedule": "one process cannot hold two stages of it",
    "init_process_group": "the process has its default group already",
}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_fit_are_taken(name, saved, process_group, registries, tmp_path):
    """What is thought to fit does; otherwise nothing but refusals would be drawn."""
    if name in IMPOSSIBLE_HERE:
        pytest.skip(IMPOSSIBLE_HERE[name])
    scene = Scene(tmp_path, saved, random.Random(0))
    call = Call(name)
    for parameter in inspect.signature(getattr(po, name)).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            call.args = fitting(name, parameter, scene)
        elif parameter.kind is not parameter.VAR_KEYWORD and (
            parameter.default is parameter.empty or parameter.name in ("num_stages", "sample_args")
        ):
            call.kwargs[parameter.name] = fitting(name, parameter, scene)[0]
    use(call.make(), scene)


METHODS = {
    name: [
        p for p in inspect.signature(getattr(po.Emulator, name)).parameters.values() if p.name in ("k", "m", "drain", "state")
    ]
    for name in dir(po.Emulator)
    if not name.startswith("_") and inspect.isfunction(getattr(po.Emulator, name))
}
"""Of a pipeline, with those of their parameters that are the library's own, and not the user's model's."""


def test_methods_of_a_pipeline_refuse_what_is_odd_in_a_sentence(saved, tmp_path):
    scene, wrong = Scene(tmp_path, saved, random.Random(seed())), []
    fits = {"k": 0, "m": 2, "state": scene.pipe().stage_state_dict(0), "batches": [(torch.ones(4, 4), torch.zeros(4, 4))]}
    inputs = {"eval_step": (torch.ones(4, 4),), "step": (torch.ones(4, 4),)}
    for name, parameters in METHODS.items():
        needed = [p.name for p in inspect.signature(getattr(po.Emulator, name)).parameters.values() if p.default is p.empty]
        for odd, make in itertools.product(parameters, ODD):
            given = {p: fits[p] for p in needed if p in fits} | {odd.name: make()}
            target = {"target": torch.zeros(4, 4)} if name in inputs else {}
            try:
                with bounded():
                    getattr(scene.pipe(), name)(*inputs.get(name, ()), **given, **target)
            except po.PipeOptimError as error:
                wrong += [] if len(str(error).splitlines()) == 1 else [f"{name}({given}): not one line: {error}"]
            except Exception:
                wrong.append(f"{name}({odd.name}={given[odd.name]!r})\n{traceback.format_exc()}")
    assert sum(map(len, METHODS.values())) > 10
    assert not wrong, f"{len(wrong)} calls:\n" + "\n".join(wrong[:5])


def test_weights_that_moved_before_a_refusal_are_found():
    class Late(Call):
        def make(self):
            with torch.no_grad():
                self.args[0].add_(1)
            raise po.ConfigError("too late")

    scene = Scene(Path(), Path(), random.Random(0))
    assert "moved" in complaint(Late("Emulator", [scene.stages[0].weight]), scene)
    assert "Traceback" in complaint(Call("Emulator", [3]), scene)
    assert complaint(Call("Clip", [nn]), scene) == ""
