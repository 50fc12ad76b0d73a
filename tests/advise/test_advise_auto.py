"""``method="auto"``: one decision for the emulator, for processes and for runs, kept by a run that is resumed."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeoptim as po
import stage_processes
from pipeoptim.advise import automatic
from pipeoptim.cli.app import _run
from pipeoptim.config import Component
from pipeoptim.engine.automatic import settle_options
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.automatic import settled
from pipeoptim.train.recipes import get_recipe

ADAMW = torch.optim.AdamW


def emulator(depth=3, make=ADAMW, **options):
    return po.Emulator(
        [nn.Linear(4, 4) for _ in range(depth)], lambda p: make(p, lr=0.1), nn.functional.mse_loss, "auto", **options
    )


def test_an_emulator_is_what_it_would_be_by_the_names_that_auto_stands_for(caplog):
    def trained(method, **options):
        torch.manual_seed(0)
        stages = [nn.Linear(4, 4) for _ in range(3)]
        pipe = po.Emulator(stages, lambda p: ADAMW(p, lr=0.1), nn.functional.mse_loss, method, 3, **options)
        for _ in range(4):
            pipe.step(torch.ones(3, 4), target=torch.zeros(3, 4))
        pipe.drain()
        return [p.detach().clone() for stage in stages for p in stage.parameters()]

    with caplog.at_level(logging.INFO, "pipeoptim"):
        auto = trained("auto")
    assert [record.message for record in caplog.records] == [automatic(3, 3, 0.9).line]
    assert all(map(torch.equal, auto, trained("pipeoptim", prediction="in_progress")))


def test_the_choice_depends_on_depth_micro_batches_and_momentum():
    def chosen(**options):
        found = emulator(**options)
        return found.method.name, found.options.prediction

    assert chosen(microbatches=4) == ("pipeoptim", "in_progress")
    assert chosen() == ("pipeoptim", "refined")
    assert chosen(prediction="decayed") == ("pipeoptim", "decayed")
    assert chosen(make=torch.optim.SGD)[0] == "naive"
    assert chosen(depth=1)[0] == "1f1b"
    with pytest.raises(ConfigError, match="microbatches"):
        emulator(microbatches=0)


def test_processes_come_to_the_same_and_equal_the_emulator_or_refuse_to_differ():
    assert all(output.endswith("done\n") for output in stage_processes.run(Path(__file__).with_name("auto_worker.py"), 2))


def test_a_process_settles_it_alone_and_other_optimizers_are_an_error():
    stages = [nn.Linear(2, 2) for _ in range(2)]
    optimizers = [ADAMW(stages[0].parameters()), torch.optim.SGD(stages[1].parameters(), lr=0.1)]
    alone = [settle_options(po.PipelineOptions, "auto", None, [optimizer], 2) for optimizer in optimizers]
    assert [po.get_method(o.method).name for o in alone] == [
        "pipeoptim",
        "naive",
    ]  # which they find out when they compare their settings
    with pytest.raises(ConfigError, match="call for different ones"):
        po.Emulator(stages, optimizers, nn.functional.mse_loss, "auto")
    assert settle_options(po.PipelineOptions, po.METHODS["naive"], None, optimizers, 2).method is po.METHODS["naive"]


def tiny(**changes):
    usual = {"steps": 4, "eval_every": 0, "stages": 2, "microbatches": 2, "method": "auto"}
    return replace(get_recipe("digits", tiny=True), **{**usual, **changes})


def test_a_run_records_what_auto_stood_for_and_keeps_it(tmp_path, capsys, monkeypatch):
    result = run(tiny(checkpoint_every=2), tmp_path / "auto", progress=False)
    assert result.status == "finished"
    assert capsys.readouterr().err.startswith("method auto: pipeoptim with prediction in_progress (D = 2, M = 2)")
    recorded = json.loads((tmp_path / "auto/config.json").read_text())
    assert (recorded["method"], recorded["prediction"]) == ("pipeoptim", "in_progress")
    # A later version may decide otherwise: that is for runs that begin.
    monkeypatch.setattr("pipeoptim.train.automatic.automatic", lambda *_: pytest.fail("decided again"))
    longer = tiny(checkpoint_every=2)
    assert run(replace(longer, steps=6), tmp_path / "auto", resume=True, progress=False).step == 6
    assert json.loads((tmp_path / "auto/config.json").read_text())["prediction"] == "in_progress"


def test_the_command_line_repeats_and_resumes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [
        "train",
        "--recipe",
        "digits",
        "--tiny",
        "--steps",
        "4",
        "--stages",
        "2",
        "--microbatches",
        "2",
        "--method",
        "auto",
        "--quiet",
    ]
    assert _run(line) == 0
    assert (tmp_path / "runs/digits-tiny-pipeoptim/config.json").exists()
    assert _run([*line, "--name", "mine"]) == 0
    capsys.readouterr()
    assert _run([*line, "--name", "mine"]) == 0
    assert "is finished" in capsys.readouterr().err
    assert _run(["train", "--resume", "--name", "mine", "--method", "auto", "--quiet"]) == 0
    assert _run(["train", "--resume", "--method", "auto", "--quiet"]) == 2
    assert "give its --name" in capsys.readouterr().err
    assert _run([*line, "--name", "paper", "--prediction", "paper"]) == 0
    assert json.loads((tmp_path / "runs/paper/config.json").read_text())["prediction"] == "paper"
    assert _run(["compare", "--methods", "auto", "--recipe", "digits", "--tiny"]) == 2
    assert "pipeoptim advise says which" in capsys.readouterr().err


WITHOUT_PREDICTION = {"ErrorFeedback": lambda p, lr: po.optim.ErrorFeedback(ADAMW(p, lr=lr))}
MAKES = {
    "AdamW": ADAMW,
    "SGD": torch.optim.SGD,
    "SpikeCompensation": lambda p, lr: po.optim.SpikeCompensation(ADAMW(p, lr=lr)),
    **WITHOUT_PREDICTION,
}
CHOICES = {
    "prediction": ["paper", "in_progress", "none"],
    "refresh": [2],
    "scale": ["auto", 0.5],
    "synchronous_updates": [2],
    "monitor": [True],
    "overlap": [True],
    "slack": [1.0],
    "recompute": ["forward"],
    "clip": [1.0],
    "processes": [2],
}


@pytest.mark.parametrize("make", MAKES)
def test_auto_is_never_refused_where_another_method_is_not(make):
    rng = random.Random(make)

    def refusal(method, depth, **options):
        stages = [nn.Linear(2, 2) for _ in range(depth)]
        try:
            po.Emulator(stages, lambda p: MAKES[make](p, lr=0.1), nn.functional.mse_loss, method, **options)
        except ConfigError as error:
            return str(error)
        return ""

    refused = 0
    for _ in range(60):
        options = {name: rng.choice(CHOICES[name]) for name in rng.sample(list(CHOICES), rng.randint(0, 3))}
        options["microbatches"] = rng.choice([1, 3, 4])
        depth = 4 if "processes" in options else rng.choice([1, 2, 4])
        told = refusal("auto", depth, **options)
        if told:
            refused += 1
            kinds = [{}] if "prediction" in options else [{}, {"prediction": "in_progress"}]
            possible = [name for name in po.METHODS for kind in kinds if not refusal(name, depth, **options, **kind)]
            assert possible == [], (depth, options, told)
    assert refused < 60


def test_auto_says_which_choice_the_options_rule_out_and_a_run_keeps_what_was_asked(capsys):
    pipe = emulator(make=WITHOUT_PREDICTION["ErrorFeedback"], microbatches=3)
    assert pipe.method.name == "naive"
    assert emulator(make=torch.optim.SGD, monitor=True).method.name == "pipeoptim"
    assert emulator(depth=1, microbatches=3, slack=1.0).method.name == "pipeoptim"
    with pytest.raises(ConfigError, match="method is 'auto', but the other options rule out each of"):
        emulator(make=WITHOUT_PREDICTION["ErrorFeedback"], monitor=True)
    plain = tiny(optimizer=Component("sgd", {"lr": 0.1}))
    assert settled(replace(plain, microbatches=1)).method == "naive"
    asked = settled(replace(plain, microbatches=1, monitor_every=5))
    assert (asked.method, asked.monitor_every) == ("pipeoptim", 5)
    assert "Instead of naive, for monitor is " in capsys.readouterr().err
    assert settled(tiny(refresh=2, stages=1)).prediction == "in_progress"
