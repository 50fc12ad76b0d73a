"""Different optimizers by stage and parameter groups with a prediction of their own, from a configuration and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeoptim.cli.app import _run
from pipeoptim.config import Component
from pipeoptim.errors import ConfigError
from pipeoptim.rules import CombinedOptimizer
from pipeoptim.train.optimizers import factory, switch
from pipeoptim.train.parameter_groups import read_group


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1, 2, 2))]


def test_one_per_stage_with_the_options_that_each_has() -> None:
    make = factory(Component("muon_adamw, sgd,adamw", {"lr": 0.01, "momentum": 0.5, "betas": [0.8, 0.9]}), 3)
    made = [make(parameters(), k) for k in range(3)]
    assert [type(optimizer) for optimizer in made] == [CombinedOptimizer, torch.optim.SGD, torch.optim.AdamW]
    assert made[1].param_groups[0]["momentum"] == 0.5
    assert made[2].param_groups[0]["betas"] == (0.8, 0.9)
    assert all(optimizer.param_groups[0]["lr"] == 0.01 for optimizer in made)


def test_groups_take_parameters_in_turn() -> None:
    groups = [{"ndim": 2, "prediction": "paper"}, {"ndim": 1, "lr": 0.5, "prediction": "none"}]
    optimizer = factory(Component("adamw", {"lr": 0.01, "groups": groups}))(parameters())
    found = [([p.ndim for p in g["params"]], g["lr"], g.get("prediction")) for g in optimizer.param_groups]
    assert found == [([2], 0.01, "paper"), ([1], 0.5, "none"), ([3], 0.01, None)]


def test_a_switch_keeps_groups_and_options_that_one_of_them_has() -> None:
    before = Component("adamw", {"lr": 0.1, "weight_decay": 0.2, "amsgrad": True, "groups": [{"ndim": 2}]})
    assert switch(before, "sgd").options == {"lr": 0.1, "weight_decay": 0.2, "groups": [{"ndim": 2}]}
    assert switch(before, "sgd,adam").options == before.options


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("sgd,adamw", {"lr": 0.1}, "names 2 for 3 stages"),
        ("sgd,adamw,asgd", {"lr": 0.1, "rho": 0.9}, "'rho' belongs to none"),
        ("sgd,adamx,sgd", {}, "adamx"),
        ("adamw", {"groups": [{"prediction": "papper"}]}, "papper"),
        ("adamw", {"groups": ["ndim=2"]}, "a parameter group is 'ndim=2'"),
        ("muon_adamw", {"groups": [{"ndim": 2}]}, "makes the groups itself"),
        ("adamw", {"groups": [{"ndim": 2}, {"lr": -1}]}, "lr of a parameter group is -1, must be a finite number above 0"),
        ("adamw", {"groups": [{"lr": float("inf")}]}, "lr of a parameter group is inf"),
        ("adamw", {"groups": [{"lr": True}]}, "lr of a parameter group is True"),
        ("adamw", {"groups": [{"weight_decay": -1}]}, "a parameter group of optimizer adamw.*Invalid weight_decay value: -1"),
        ("adamw", {"groups": [{"betas": 3}]}, "a parameter group of optimizer adamw"),
        ("adamw", {"groups": [{"momentum": 0.9}]}, "option 'momentum' of a parameter group is none of optimizer adamw"),
        ("adamw", {"groups": [{"params": 3}]}, "option 'params' of a parameter group"),
        ("adamw", {"groups": [{"ndim": "two"}]}, "ndim of a parameter group is 'two', must be a number of dimensions"),
    ],
)
def test_bad_input_is_refused(target: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        factory(Component(target, options), 3)(parameters())
    with pytest.raises(ConfigError, match="group is 'ndim', must be like"):
        read_group("ndim")
    with pytest.raises(ConfigError, match="names lr twice"):
        read_group("lr=1,lr=2")
    assert read_group("lr=1e-3")["lr"] == 0.001


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [
        "train",
        "--recipe",
        "digits",
        "--stages",
        "4",
        "--steps",
        "30",
        "--out",
        str(tmp_path),
        "--quiet",
        "--eval-every",
        "0",
    ]
    groups = ["--group", "ndim=2,prediction=displacement", "--group", "prediction=none"]
    assert _run([*shared, "--optimizer", "adam,sgd,nadam,adamw", "--lr", "0.01", "--name", "mixed", *groups]) == 0
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["optimizer"]["target"] == "adam,sgd,nadam,adamw"
    assert config["optimizer"]["options"]["groups"] == [{"ndim": 2, "prediction": "displacement"}, {"prediction": "none"}]
    assert len((tmp_path / "mixed" / "metrics.jsonl").read_text().splitlines()) >= 3
    assert _run([*shared, "--optimizer", "adam,sgd", "--name", "two"]) == 2
    assert "names 2 for 4 stages; name one, or one per stage" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    assert (
        _run(["train", "--resume", "--recipe", "digits", "--name", "mixed", "--out", str(tmp_path), "--group", "ndim=2"]) == 2
    )
