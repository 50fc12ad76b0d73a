"""What a user is told: the first cause first, whole sentences, one of a thing in the singular."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def without_privilege() -> Iterator[None]:
    """Root meets closed folders as others do: without the capabilities of passing them by, which this thread takes up again."""
    if os.geteuid() != 0:
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    had = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of 32 capabilities and again of 32
    assert libc.capget(header, had) == 0
    fewer = (ctypes.c_uint32 * 6)(had[0] & ~0b110, *had[1:])  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, had) == 0


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
    for group, words in (
        ([], "cut it, and say what every method will cost."),
        (["bench"], "own schedules, each at its best M."),
    ):
        assert _run([*group, "--help"]) == 0
        listed = " ".join(capsys.readouterr().out.split("Commands:")[1].split())
        assert words in listed and "..." not in listed


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


CLOSED = {
    "faults": ["kill stage 1 at update 3", "--out", "closed/f", "--", "--recipe", "tiny:recipe", "--engine", "processes"],
    "train": ["--recipe", "tiny:recipe", "--out", "closed/f"],
    "compare": ["--recipe", "tiny:recipe", "--methods", "1f1b", "--out", "closed/f"],
    "report": ["closed/f"],
    "watch": ["closed/f"],
    "export": ["closed/f"],
    "simulate": ["--profile", "closed/f"],
}


@pytest.mark.parametrize("command", CLOSED)
def test_a_path_that_is_closed_to_the_user_is_bad_input(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed").mkdir(mode=0)
    with without_privilege():
        code = _run([command, *CLOSED[command]])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert "closed" in error and "permission denied" in error.lower()


@pytest.mark.parametrize("command", ["report", "watch", "train"])
def test_a_device_in_place_of_the_rows_of_a_run_is_told(command: str, begun: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Path("runs/tiny-pipeoptim/metrics.jsonl")
    rows.unlink()
    rows.symlink_to("/dev/zero")
    assert _run(["train", "--resume", "--name", "tiny-pipeoptim"] if command == "train" else [command, str(rows.parent)]) == 2
    assert f"{rows} is no file" in capsys.readouterr().err
    assert Path("runs/tiny-pipeoptim/result.json").exists()


def test_a_run_without_a_checkpoint_is_exported_after_its_command_is_given_again(
    begun: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("runs/tiny-pipeoptim/checkpoints")
    assert _run(["export", "runs/tiny-pipeoptim"]) == 2
    assert "give the command that began this run again, without --resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["simulate", "--synthetic", "--picture"], ["methods", "1f1b", "--svg"], ["plan", "--svg"]])
def test_a_drawing_is_an_svg(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([*command, str(tmp_path / "x.png")]) == 2
    out, error = capsys.readouterr()
    assert f"but draws an SVG; give it that ending, as {tmp_path / 'x.svg'}" in error and not out


def test_of_a_huge_value_only_the_beginning_is_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["explain", "w" * 9999]) == 2
    error = capsys.readouterr().err
    assert len(error) < 300 and error.endswith("...'; for all names, pipeoptim explain [cli.commands.explain]\n")


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
