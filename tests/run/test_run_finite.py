"""Weights that are not finite are never called a result, never saved in place of healthy ones, and never resumed from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from compare import final_states
from pipeoptim.checkpoint import find, load_stage, save
from pipeoptim.cli.app import _run
from pipeoptim.compare.worker import carry_out
from pipeoptim.config import Component, TrainConfig
from pipeoptim.errors import ConfigError, PipeOptimError
from pipeoptim.train import run
from pipeoptim.train.group import SingleProcessGroup
from pipeoptim.train.rundir import RunDir


def steps_saved(where: Path) -> list[str]:
    return sorted(folder.name for folder in (where / "checkpoints").iterdir())


def test_the_recipe_does_poison_its_weights_and_its_losses_are_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeoptim.train.session.sick_weight", lambda _pipe: None)
    result = run(tiny.poisoned(), tmp_path / "run", progress=False)
    assert result.val_loss is not None
    states = final_states(tmp_path / "run")[1]
    assert any(bool(t.isnan().any()) for t in states[0]["module"].values())


@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_a_run_whose_weights_are_not_finite_fails_and_keeps_the_healthy_checkpoint(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    assert _run(["train", "--recipe", "tiny:poisoned", "--name", "sick", "--engine", engine, "--quiet"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the weights of stage 0 are not finite at step 16 (first: '1.side')" in line
    assert "resume from step 8 with" in line
    assert steps_saved(tmp_path / "runs/sick") == ["step-000008"]
    assert not (tmp_path / "runs/sick/result.json").exists()


def test_a_comparison_calls_it_diverged(tmp_path: Path) -> None:
    outcome = carry_out(tiny.poisoned(), tmp_path / "run")
    assert outcome["status"] == "diverged"
    assert outcome["step"] == 16
    assert "the weights of stage 0 are not finite" in outcome["reason"]


def spoil(where: Path, step: int, config: TrainConfig, value: float, name: str = "0.0.weight") -> None:
    """Write the checkpoint of ``step`` again, complete in every byte, with a weight that is ``value``."""
    folder = where / "checkpoints" / f"step-{step:06d}"
    states = {k: load_stage(folder, k) for k in range(config.stages)}
    states[0]["module"][name].view(-1)[1] = value
    save(folder.parent, step, states, config=config.fingerprint(), group=SingleProcessGroup(), keep=9, versions={})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, where = tiny.recipe(), tmp_path / "tiny"
    run(config, where, progress=False)
    whole = final_states(where)
    spoil(where, 24, config, value)
    result = run(config, where, resume=True, progress=False)
    warning = capsys.readouterr().err
    assert "step-000024 has weights that are not finite (stage 0: '0.0.weight'); resuming from step-000016" in warning
    assert result.step == 24
    for one, other in zip(final_states(where)[1], whole[1], strict=True):
        assert all(torch.equal(one["module"][name], t) for name, t in other["module"].items())


def test_one_that_was_passed_over_does_not_stand_in_for_a_healthy_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are kept. One of step 13, as an interrupted run left it, is sick: it does not count."""
    config, where = tiny.recipe(), tmp_path / "tiny"

    def crash(at: int, resume: bool) -> None:
        monkeypatch.setenv("TINY_CRASH_AT", str(at))
        with pytest.raises(OSError, match="the disk of the data is gone"):
            run(config, where, resume=resume, progress=False)

    crash(10, resume=False)
    states = {k: load_stage(where / "checkpoints/step-000008", k) for k in range(2)}
    states[0]["module"]["0.0.weight"].view(-1)[0] = float("nan")
    save(where / "checkpoints", 13, states, config=config.fingerprint(), group=SingleProcessGroup(), keep=9, versions={})
    crash(20, resume=True)
    assert steps_saved(where) == ["step-000008", "step-000013", "step-000016"]


def test_without_a_healthy_checkpoint_nothing_is_resumed(tmp_path: Path) -> None:
    config, where = tiny.recipe(), tmp_path / "tiny"
    run(config, where, progress=False)
    for step in (16, 24):
        spoil(where, step, config, float("nan"))
    with pytest.raises(ConfigError, match=r"step-000024: weights that are not finite, stage 0: '0\.0\.weight'; step-000016"):
        run(config, where, resume=True, progress=False)


def test_buffers_may_hold_infinity(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), model=Component("tiny:masked"), steps=8)
    run(config, tmp_path / "run", progress=False)
    states = final_states(tmp_path / "run")[1]
    assert any(bool(t.isinf().any()) for state in states for t in state["module"].values())
    (tmp_path / "run" / "result.json").unlink()
    assert run(config, tmp_path / "run", resume=True, progress=False).status == "finished"


def test_a_run_that_diverges_after_it_was_stopped_is_not_called_stopped(tmp_path: Path) -> None:
    where = tmp_path / "run"
    with pytest.raises(PipeOptimError, match="not finite"):
        run(tiny.poisoned(), where, progress=False)
    found = find(where / "checkpoints")
    assert found.meta is not None and found.meta.step == 8
    assert RunDir(where).finished_at() is None
    assert json.loads((where / "config.json").read_text())["steps"] == 24
