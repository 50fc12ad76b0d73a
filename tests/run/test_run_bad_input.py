"""Input that cannot work: one line that says value, reason and remedy; exit code 2; nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

import processes
from pipeoptim.cli.app import _run

TINY = ["--recipe", "tiny:recipe"]

#: Arguments, and what the line must say.
CASES = {
    "stages above blocks": ([*TINY, "--stages", "9"], ["stages is 9", "only 5 blocks", "at most 5"]),
    "stages above blocks with weights": ([*TINY, "--stages", "5"], ["stages is 5", "only 4 of 5 blocks have parameters"]),
    "stages of default recipe": (["--stages", "7"], ["stages is 7", "only 6 blocks"]),
    "no stages": ([*TINY, "--stages", "0"], ["stages is 0", "at least 1"]),
    "micro-batches do not divide": (
        [*TINY, "--microbatches", "3"],
        ["batch_size 8", "3 equal micro-batches", "set batch_size to 6 or 9"],
    ),
    "more micro-batches than samples": ([*TINY, "--microbatches", "16"], ["batch_size 8", "set batch_size to 16"]),
    "no micro-batches": ([*TINY, "--microbatches", "0"], ["microbatches is 0"]),
    "unknown method": ([*TINY, "--method", "pipoptim"], ["'pipoptim'", "did you mean 'pipeoptim'?", "known:", "pipedream"]),
    "unknown optimizer": ([*TINY, "--optimizer", "adanw"], ["'adanw'", "did you mean 'adam", "known:", "sgd"]),
    "impossible optimizer": ([*TINY, "--optimizer", "lbfgs"], ["'lbfgs'", "several times per update", "use adamw"]),
    "unknown recipe": (["--recipe", "charz"], ["'charz'", "did you mean 'chars'?", "digits"]),
    "recipe of no module": (["--recipe", "nowhere:recipe"], ["'nowhere:recipe'", "cannot be imported"]),
    "recipe of no function": (["--recipe", "tiny:nothing"], ["'tiny:nothing'", "has no 'nothing'"]),
    "recipe that returns no configuration": (["--recipe", "tiny:not_a_config"], ["returned a str", "TrainConfig"]),
    "unknown prediction": ([*TINY, "--prediction", "papier"], ["'papier'", "did you mean 'paper'?"]),
    "unknown engine": ([*TINY, "--engine", "process"], ["'process'", "did you mean 'processes'?"]),
    "lr nan": ([*TINY, "--lr", "nan"], ["lr is nan", "finite number above 0"]),
    "lr inf": ([*TINY, "--lr", "inf"], ["lr is inf"]),
    "lr zero": ([*TINY, "--lr", "0"], ["lr is 0"]),
    "lr negative": ([*TINY, "--lr", "-0.1"], ["lr is -0.1"]),
    "lr no number": ([*TINY, "--lr", "fast"], ["--lr", "fast"]),
    "no steps": ([*TINY, "--steps", "0"], ["steps is 0"]),
    "negative steps": ([*TINY, "--steps", "-5"], ["steps is -5"]),
    "no batch": ([*TINY, "--batch-size", "0"], ["batch_size is 0"]),
    "batch above validation set": ([*TINY, "--batch-size", "128"], ["batch_size 128", "lower batch_size"]),
    "negative seed": ([*TINY, "--seed", "-1"], ["seed is -1"]),
    "negative eval-every": ([*TINY, "--eval-every", "-1"], ["eval_every is -1"]),
    "no threads": ([*TINY, "--threads", "0"], ["threads is 0"]),
    "loss that is no scalar": (["--recipe", "tiny:vector_loss"], ["shape [8]", "must be a scalar", "mean"]),
    "clipping of tied weights": (
        ["--recipe", "tiny:tied_weights", "--clip", "1.0"],
        ["scope 'global_delayed'", "use scope 'global'"],
    ),
    "loss without gradient": (["--recipe", "tiny:detached_loss"], ["has no gradient", "nothing would be trained"]),
    "nothing to train": (["--recipe", "tiny:nothing_to_train"], ["none of the 2 blocks", "parameters to train"]),
    "model and data": (["--recipe", "tiny:misfit"], ["does not fit micro-batches of 8 of the data"]),
    "BatchNorm of one sample": ([*TINY, "--microbatches", "8"], ["micro-batches of 1", "Expected more than 1 value"]),
    "data that are not there": (["--recipe", "tiny:missing_data"], ["tiny:Missing", "No such file", "nowhere.bin"]),
    "recipe with arguments": (["--recipe", "tiny:with_argument"], ["needs arguments", "'width'", "default values"]),
    "recipe of no name": (["--recipe", ""], ["unknown recipe ''", "known: "]),
    "optimizer that has no such class": ([*TINY, "--optimizer", "torch.optim:Adamm"], ["no 'Adamm'", "correct the name"]),
    "muon on vectors": ([*TINY, "--optimizer", "muon"], ["muon", "2D parameters"]),
    "decayed without momentum": ([*TINY, "--optimizer", "adagrad", "--prediction", "decayed"], ["not offered for Adagrad"]),
    "too few micro-batches": ([*TINY, "--method", "pipedream_2bw"], ["microbatches is 1, depth is 2", "2 or more"]),
    "steps as a float": ([*TINY, "--steps", "1e3"], ["--steps is '1e3'", "integer"]),
    "large seed": ([*TINY, "--seed", str(2**64)], [f"seed is {2**64}", "at most"]),
    "many threads": ([*TINY, "--threads", str(10**14)], [f"threads is {10**14}", "at most"]),
    "clip nan": ([*TINY, "--clip", "nan"], ["clip is nan", "finite number"]),
    "unknown scope without clip": ([*TINY, "--clip-scope", "globl"], ["'globl'", "global_delayed"]),
    "scope without clip": ([*TINY, "--clip-scope", "stage"], ["clip_scope is 'stage'", "without --clip"]),
    "refresh of another prediction": ([*TINY, "--refresh", "2"], ["refresh is 2", "without --prediction in_progress"]),
    "unknown compression": ([*TINY, "--compress", "int4"], ["compress is 'int4'", "'bf16' or 'int8'"]),
    "feedback of nothing": ([*TINY, "--error-feedback", "both"], ["'both'", "without --compress"]),
    "name that is empty": ([*TINY, "--name", ""], ["name is ''", "one folder"]),
    "name of two lines": ([*TINY, "--name", "a\nb"], [r"'a\nb'", "one folder"]),
    "name that is too long": ([*TINY, "--name", "a" * 300], ["one folder"]),
    "word without an option": (["digits"], ["unexpected", "digits", "--help"]),
    "name that is a path": ([*TINY, "--name", "../x"], ["'../x'", "--out"]),
    "resume of nothing": (["--resume", "--name", "nothing"], ["there is no run in", "check its name"]),
    "lr of a group nan": ([*TINY, "--group", "lr=nan"], ["lr of a parameter group is nan", "finite number above 0"]),
    "lr of a group negative": ([*TINY, "--group", "ndim=2,lr=-1"], ["lr of a parameter group is -1"]),
    "group of no weights": ([*TINY, "--group", "ndim=9,lr=1"], ["'ndim': 9", "takes no weights"]),
    "unknown option": (["--epochs", "3"], ["--epochs", "--help"]),
}


def complain(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    assert _run(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_one_line_and_nothing_written(
    case: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, expected = CASES[case]
    line = complain([*arguments, *([] if "--engine" in arguments else ["--engine", engine])], capsys)
    for part in expected:
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_run_that_exists_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    line = complain([*TINY, "--name", "mine"], capsys)
    assert "runs/mine exists" in line
    assert "--resume" in line
    assert "--name" in line
    assert list((tmp_path / "runs" / "mine").iterdir()) == []


def test_run_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    line = complain([*TINY, "--out", str(tmp_path / "file"), "--name", "x"], capsys)
    assert "cannot be made" in line


def test_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    with processes.train(tmp_path, *TINY, "--lr", "nan") as command:
        assert command.wait() == 2
        assert command.err.startswith("pipeoptim: lr is nan")
        assert not (tmp_path / "runs").exists()


def test_loss_that_diverges_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(["train", *TINY, "--optimizer", "sgd", "--lr", "1e38", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "lower the learning rate" in error
    assert len(error.splitlines()) == 1
