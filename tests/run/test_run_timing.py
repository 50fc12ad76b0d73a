"""A run says how long its stages take and which has become slow; a plan made from it moves blocks, and the run goes on with them."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from compare import final_states
from pipeoptim.cli.app import _run
from pipeoptim.config import Component, TrainConfig, read_cut
from pipeoptim.errors import ConfigError
from pipeoptim.telemetry.metrics import read_rows
from pipeoptim.train import recut, run
from pipeoptim.train.rundir import RunDir
from pipeoptim.train.stagewise import StagewiseModel
from processes import HERE


class Waiting(nn.Linear):
    """Waits in its forward, and from forward ``at`` on longer, as on a device that has become slow."""

    def __init__(self, width: int, at: int) -> None:
        super().__init__(6, width)
        self.at, self.seen = at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += self.training
        time.sleep(0.001 if self.seen < self.at else 0.02)
        return super().forward(x)


def model(at: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Waiting(6, at), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def timed(at: int = 60, **changes: object) -> TrainConfig:
    config = replace(
        tiny.steady(), model=Component("test_run_timing:model", {"at": at}), steps=100, eval_every=0, checkpoint_every=0
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def test_processes_say_how_late_their_messages_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])))
    run(replace(tiny.steady(), engine="processes", steps=52), tmp_path / "run", progress=False)
    (row,) = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "timing" in row]
    first, last = sorted(row["timing"], key=lambda one: int(one["stage"]))
    assert first["late_activations"] == last["late_gradients"] == 0.0
    assert 0 < last["late_activations"] < 60
    assert 0 < first["late_gradients"] < 60


def test_a_stage_that_becomes_slow_is_named_and_a_plan_from_the_run_cuts_it_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = timed(cut="3,2")
    run(config, tmp_path / "runs/slow", progress=True)
    rows = [row for row in read_rows(tmp_path / "runs/slow/metrics.jsonl") if "timing" in row]
    assert [row["step"] for row in rows] == [50, 100]
    first, last = ({one["stage"]: one for one in row["timing"]} for row in rows)
    assert last[0]["slowed"] > max(1.2, 1.5 * first[0]["slowed"]) and last[0]["computing"] > 0.02
    assert "stage 0 has become slow: a mini-batch takes it" in capsys.readouterr().out
    assert _run(["plan", "--from-run", "runs/slow"]) == 0
    output = capsys.readouterr().out
    assert "in run runs/slow the stages of 3,2 blocks took" in output
    assert "pipeoptim train --resume --name slow --cut" in output
    for wrong, words in (
        (["--stages", "3"], "timed 2 stages"),
        (["--recipe", "chars"], "--from-run has the run's own model"),
    ):
        assert _run(["plan", "--from-run", "runs/slow", *wrong])
        assert words in capsys.readouterr().err


class Ordinary(nn.Module):
    """No container that could be sliced: it is cut between the layers of a list inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stagewise() -> StagewiseModel:
    with torch.device("meta"):
        skeleton = Ordinary()
    return StagewiseModel(skeleton, lambda _names: Ordinary().state_dict())


@pytest.mark.parametrize(("target", "cut"), [("Ordinary", ""), ("Ordinary", "2,2"), ("stagewise", "")])
def test_a_plan_from_a_run_of_a_model_that_is_cut_between_its_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, target: str, cut: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run(timed(model=Component(f"test_run_timing:{target}"), cut=cut, steps=50), tmp_path / "runs/a", progress=False)
    assert _run(["plan", "--from-run", "runs/a"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert "after layers.2" in output, "the last block"
    assert "in run runs/a the stages of 2,2 blocks took" in output


def test_a_run_goes_on_with_another_cut(tmp_path: Path) -> None:
    config = timed(at=10**6, steps=6)
    run(config, tmp_path / "even", progress=False)
    longer = replace(config, steps=9, cut="1,4")
    directory = recut(RunDir(tmp_path / "even"), longer)
    assert directory.path.name == "even-2-stages-cut-1-4"
    assert run(longer, directory.path, resume=True, progress=False).step == 9
    step, states = final_states(directory.path)
    assert step == 9
    assert [sum(name.endswith("weight") for name in state["module"]) for state in states] == [1, 4]
    # Weights of a plain run with that cut from the beginning, to rounding: nothing here draws random numbers.
    run(replace(longer, checkpoint_every=6), tmp_path / "plain", progress=False)
    for ours, theirs in zip(states, final_states(tmp_path / "plain")[1], strict=True):
        for name, weight in ours["module"].items():
            assert weight.shape == theirs["module"][name].shape
            assert torch.isfinite(weight).all()


def test_a_cut_that_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0,5", "a", "1,,4", "-1,6"):
        with pytest.raises(ConfigError, match="must be how many blocks each stage has"):
            read_cut(text)
    for text in ("1,3", "1,2,2"):
        with pytest.raises(ConfigError, match="must have a number of blocks for each of 2 stages, 5 in all"):
            run(timed(cut=text), tmp_path / text, progress=False)
    run(timed(steps=6), tmp_path / "short", progress=False)
    assert _run(["plan", "--from-run", str(tmp_path / "short")])
    assert "has no times of its stages" in capsys.readouterr().err
