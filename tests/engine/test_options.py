"""Every option is one entry: constructors, their signatures, their documentation, training runs and the command line follow it."""

import inspect
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeoptim as po
from pipeoptim import options
from pipeoptim.options import generate

PIPELINES = {
    po.Emulator: options.OPTIONS,
    po.Schedule: options.PROCESS_OPTIONS,
    po.InterleavedSchedule: options.PROCESS_OPTIONS,
}
KEYWORDS = {**options.OptionKeywords.__annotations__, **options.ProcessKeywords.__annotations__}
x = torch.ones(4, 4)


def emulator(**given):
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4) for _ in range(2)]
    return po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), nn.functional.mse_loss, **given)


def test_keywords_and_fields_are_the_same_options():
    named = {f.name for f in fields(po.PipelineOptions)} - {"method", "microbatches"}
    assert named | set(options.RENAMED) == set(KEYWORDS)
    assert set(options.RENAMED.values()) <= named


def test_what_is_written_out_for_type_checkers_is_current():
    assert generate.main(["--check"]) == 0


ENTRY = """
    pauses: int = option(1, "rests between updates.", count, agreed=EQUAL, in_runs=True)
"""
USE = """
import inspect, torch, pipeoptim as po
from pipeoptim.cli.app import _run
from pipeoptim.config import Component, TrainConfig
from pipeoptim.options import options_of_run

stages = [torch.nn.Linear(2, 2)]
pipe = po.Emulator(stages, lambda p: torch.optim.SGD(p, lr=0.1), torch.nn.functional.mse_loss, pauses=3)
assert pipe.options.pauses == 3 and "pauses=3" in pipe.options.describe()
assert inspect.signature(po.Schedule).parameters["pauses"].default == 1
assert "pauses: rests between updates. Equal in all processes." in po.Schedule.__doc__
config = TrainConfig("mine", *[Component("m:f")] * 3, pauses=2)
assert options_of_run(config)["pauses"] == 2 and TrainConfig.from_json(config.to_json()) == config
assert config.fingerprint() != TrainConfig("mine", *[Component("m:f")] * 3).fingerprint()
assert [_run([command, "--help"]) for command in ("train", "compare")] == [0, 0]
"""


def test_a_new_option_is_one_entry(tmp_path):
    """Tried on a copy of the package: an entry in the table, and nothing else."""
    shutil.copytree(Path(po.__path__[0]), tmp_path / "pipeoptim", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "pipeoptim/options/table.py"
    before, after = table.read_text().split("\n    replicas: ", maxsplit=1)
    table.write_text(f"{before}{ENTRY}\n    replicas: {after}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (["-m", "pipeoptim.options.generate"], ["-c", USE]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("--pauses <int>") == done.stdout.count("Rests between updates.") == 2


def test_every_option_says_what_it_means():
    for entry in fields(po.PipelineOptions):
        assert options.about(entry).help.endswith("."), entry.name


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_signature_and_documentation_show_all_options(pipeline):
    parameters = inspect.signature(pipeline).parameters
    defaults = {f.name: f.default for f in fields(po.PipelineOptions)}
    for name in PIPELINES[pipeline]:
        assert parameters[name].default == defaults[name]
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"        {name}: " in pipeline.__doc__
    assert {"method", "microbatches"} < set(parameters)
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_defaults_of_method_and_microbatches_are_those_of_the_options(pipeline):
    parameters = inspect.signature(pipeline).parameters
    assert parameters["method"].default == options.DEFAULTS.method
    assert parameters["microbatches"].default == options.DEFAULTS.microbatches


def test_a_pipeline_shows_its_options_and_another_takes_them():
    pipe = emulator(method="pipedream", microbatches=2, clip=1.0, uneven=True)
    assert pipe.options.clip == po.Clip(1.0)
    again = emulator(**pipe.options.keywords())
    assert again.options == pipe.options
    assert emulator().options.keywords() == {}


WRONG = {
    "a close name": ({"clp": 1.0}, "unknown Emulator option 'clp'; did you mean 'clip'?"),
    "an argument of its own": ({"scheduler": None}, "unknown Emulator option 'scheduler'; did you mean 'schedulers'?"),
    "an option of processes": ({"transport": "auto"}, "transport is an option of pipelines in several processes"),
    "tied": ({"tied": 3}, "tied is 3, must be the tied of a partition"),
    "on_update": ({"on_update": 3}, "on_update is 3, must be a function"),
    "loss_weight": ({"loss_weight": 3}, "loss_weight is 3, must be a function"),
    "prediction where nothing predicts": ({"method": "gpipe", "prediction": "best"}, "prediction is 'best', must be one of"),
    "recompute": ({"recompute": None}, "recompute is None, must be one of"),
    "microbatches": ({"microbatches": "2"}, "microbatches is '2', must be an integer"),
    "microbatches that are true": ({"microbatches": True}, "microbatches is True, must be an integer"),
    "clip": ({"clip": "1"}, "clip is '1', must be 'adagc', a pipeoptim.Clip or AdaGC, or the largest"),
    "monitor": ({"monitor": None}, "monitor is None, must be True"),
    "both names": ({"weigh": len, "loss_weight": len}, "weigh is the former name of loss_weight, and both were given"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_option_is_refused_with_a_sentence(case):
    given, words = WRONG[case]
    with pytest.raises(po.ConfigError, match=words):
        emulator(**given)


def test_options_of_processes_are_checked_alike():
    for name, value in {"timeout": -1, "liveness_timeout": "long", "transport": "tcp", "replicas": 3}.items():
        with pytest.raises(po.ConfigError, match=f"{name} is "):
            po.PipelineOptions(**{name: value})
    assert po.PipelineOptions(liveness_timeout=None).liveness_timeout is None


def test_the_former_name_of_loss_weight_works_with_a_warning():
    losses = []
    for name in ("loss_weight", "weigh"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            pipe = emulator(method="1f1b", microbatches=2, **{name: lambda target: float(target.sum())})
        assert [w.category for w in told] == [DeprecationWarning] * (name == "weigh")
        assert [w.filename for w in told] == [__file__] * len(told)
        losses.append(pipe.step(x, target=torch.arange(4.0).reshape(4, 1).expand(4, 4)))
    assert torch.equal(*losses)


def test_what_processes_must_agree_on_is_described_without_addresses():
    mine = po.Method(
        "mine", order="async_1f1b", forward=po.get_method("naive").forward, backward=po.get_method("naive").backward, summary=""
    )
    told = po.PipelineOptions(mine, 4, clip=1.0, scaler=torch.amp.GradScaler("cpu"), on_update=print).describe(replicas=2)
    assert "method=mine microbatches=4" in told
    assert "scaler=on" in told and "replicas=2" in told
    assert "0x" not in told and "on_update" not in told


@pytest.mark.parametrize("pipeline", [po.Emulator, po.Schedule, po.InterleavedSchedule])
def test_help_shows_types_as_the_code_has_them(pipeline):
    shown = str(inspect.signature(pipeline))
    assert "ForwardRef" not in shown and "clip: 'Clip | AdaGC | float | str | None' = None" in shown
