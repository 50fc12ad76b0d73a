"""``pipeoptim compare`` as a user starts it: to the end, interrupted and continued, and with a worker that dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from compare_commands import HERE, finish, started, wait_for
from pipeoptim.cli.app import _run

ARGUMENTS = ["compare", "--methods", "gpipe,pipeoptim", "--seeds", "2", "--jobs", "1", "--out", "c"]


MINE = """
from pipeoptim.methods import Method
from pipeoptim.methods.method import OwnOptimizer
from pipeoptim.weights import Latest, Predicted

def half(program, k, i):
    return program.gap(k, i) // 2

MINE = Method("mine", order="async_1f1b", forward=Predicted(half), backward=Latest(), summary="predicts half of the gap",
              optimizer=OwnOptimizer("RMSprop", lambda k, depth: {"alpha": 0.9}))
"""


def outcomes(folder: Path) -> dict[str, int]:
    """Finished runs, and when each was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("c/runs/*/outcome.json")}


def losses(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    entries = json.loads((folder / "c/summary.json").read_text())
    return {(e["method"], e["seed"]): (e["final_train_loss"], e["final_val_loss"]) for e in entries}


def test_interrupted_continued_equal_to_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    whole.mkdir()
    command = [*ARGUMENTS, "--recipe", "compare_cases:recipe"]
    with started(broken, *command, COMPARE_HOLD="yes") as process:
        wait_for(lambda: (broken / "c/runs/gpipe-seed1").exists())
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err and "same command again continues" in err
    before = outcomes(broken)
    assert before.keys() == {"gpipe-seed0", "pipeoptim-seed0"}
    assert not (broken / "c/summary.json").exists()

    code, out, err = finish(broken, *command)
    assert code == 0, err
    after = outcomes(broken)
    assert len(after) == 4
    assert {name: after[name] for name in before} == before, "finished runs were repeated"
    assert f"{len(before)} of 4 runs were finished before" in out
    assert 10_000 < (broken / "c/report.html").stat().st_size < 1_000_000

    code, out, err = finish(whole, *command)
    assert code == 0, err
    assert losses(whole) == losses(broken)
    assert len(losses(whole)) == 4
    assert not list(whole.glob("c/runs/*/checkpoints")), "weights are not kept"

    monkeypatch.chdir(whole)
    monkeypatch.syspath_prepend(str(HERE))
    assert _run([*command, "--lr", "0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lr is 0.5" in line and "--out" in line
    assert _run(["report", "c"]) == 0
    assert "c/report.html" in capsys.readouterr().out


def test_a_worker_that_dies_costs_its_run_only(tmp_path: Path) -> None:
    arguments = [*ARGUMENTS, "--recipe", "compare_cases:recipe"]
    code, _, err = finish(tmp_path, *arguments, COMPARE_DIE="yes")
    assert code == 1
    assert "2 of 4 runs failed" in err and "exit code 9" in err and "Traceback" not in err
    assert {seed for (_, seed), loss in losses(tmp_path).items() if loss[1] is not None} == {0}
    before = outcomes(tmp_path)
    code, _, err = finish(tmp_path, *arguments)
    assert code == 0, err
    after = outcomes(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"gpipe-seed1", "pipeoptim-seed1"}
    assert all(loss[1] is not None for loss in losses(tmp_path).values())


def test_divergence_is_a_result(tmp_path: Path) -> None:
    """And a method of one's own takes part, with an optimizer of its own, from a file."""
    (tmp_path / "mine.py").write_text(MINE)
    arguments = ["compare", "--methods", "gpipe,nesterov,mine.py:MINE", "--recipe", "digits", "--steps", "12", "--out", "c"]
    code, out, err = finish(tmp_path, *arguments, "--lr", "1e30", "--stages", "3")
    assert code == 0, err
    entries = {e["method"]: e for e in json.loads((tmp_path / "c/summary.json").read_text())}
    assert entries["gpipe"]["diverged"] and entries["gpipe"]["final_val_loss"] is None
    assert not entries["nesterov"]["diverged"], "NAdam with a learning rate of its own"
    assert "gpipe diverged with seed 0: the loss is" in out
    assert not entries["mine.py:MINE"]["diverged"] and "rmsprop" in entries["mine.py:MINE"]["optimizer"]
    assert "half of the gap" in (tmp_path / "c/report.html").read_text()
