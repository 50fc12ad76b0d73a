"""What a user is told: the first cause first, whole sentences, one of a thing in the singular."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from pipeoptim.cli.app import _run
from pipeoptim.train import run
from pipeoptim.train.layout import Layout

TINY = ["train", "--recipe", "tiny:recipe", "--quiet"]


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a run of the name that a command would choose."""
    monkeypatch.chdir(tmp_path)
    run(replace(tiny.recipe(), steps=4), "runs/tiny-pipeoptim", progress=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stages", "1000"], "stages is 1000, but the model has only 5 blocks"),
        (["--group", "ndim=2,predicton=paper"], "option 'predicton' of a parameter group"),
        (["--clip", "-1"], "clip is -1"),
        (["--lr", "0.5"], "run directory runs/tiny-pipeoptim exists"),
        (
            ["--resume", "--steps", "2"],
            "steps is 2, but the run was begun with 4 and the shape of its lr_schedule 'cosine' depends",
        ),
    ],
)
def test_what_cannot_work_is_told_before_what_is_in_its_way(
    options: list[str], words: str, begun: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*TINY, *options]) == 2
    assert words in capsys.readouterr().err


def test_options_that_another_optimizer_keeps_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for optimizer, told in (("adam", True), ("rprop", False)):
        assert _run([*TINY[:-1], "--steps", "4", "--optimizer", optimizer, "--name", optimizer]) == 0
        assert (f"optimizer {optimizer}: weight_decay 0.1, as the recipe's adamw\n" in capsys.readouterr().out) == told


def test_lists_of_commands_are_not_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split("Commands:")[1].split())
    assert "cut it, and say what every method will cost." in listed
    assert "..." not in listed


def test_one_is_singular(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Layout(stages=1).describe() == "1 stage"
    assert _run(["plan", "--recipe", "digits", "--stages", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 stage, 1 micro-batch per mini-batch" in out
    for heading in ("mini-batches/s", "largest gap", "most copies"):  # whole, though a pipe has no width
        assert heading in out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pipeoptim tr", ["train"]),
        ("pipeoptim train --checkp", ["--checkpoint-every"]),
        ("pipeoptim train --engine p", ["processes"]),
    ],
)
def test_a_shell_completes_commands_options_and_their_values(words: str, found: list[str]) -> None:
    environment = {**os.environ, "_PIPEOPTIM_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    command = [sys.executable, "-c", "from pipeoptim.cli import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == found


def test_a_closed_folder_is_told_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path) != tmp_path
    )  # root may write to folders that are closed to others
    code = _run(["profile", "--recipe", "digits", "--out", str(tmp_path / "x.json")])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert f"nothing can be written to the folder {tmp_path}; make it writable" in error
