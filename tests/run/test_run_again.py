"""The same command again begins, continues or says finished; no two at once; and what ended at a bad moment is finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import processes
import tiny
from compare import assert_same_state, timeless
from pipeoptim.cli.app import _run
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.lock import locked
from pipeoptim.train.result import RunResult

COMMAND = ["train", "--recipe", "tiny:recipe", "--quiet"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(tiny.__file__).parent))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def crash(at: int, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TINY_CRASH_AT", str(at))
        assert _run([*COMMAND, *options]) == 1


@pytest.mark.parametrize("at", [3, 20])
def test_the_same_command_begins_continues_and_says_finished(
    at: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tiny.recipe(), "whole", progress=False)
    crash(at, monkeypatch)  # before the first checkpoint, or behind the second one
    assert _run(COMMAND) == 0
    said = capsys.readouterr().err
    assert ("no checkpoint yet" if at < 8 else "continues from step 16 of 24") in said
    here = Path("runs/tiny-pipeoptim")
    assert_same_state(here, whole.run_dir)
    assert timeless(here) == timeless(whole.run_dir)
    before = (here / "result.json").read_text()
    for again in (COMMAND, ["train", "--resume", "--name", "tiny-pipeoptim", "--quiet"]):
        assert _run(again) == 0
        assert "is finished (24 of 24 steps)" in capsys.readouterr().err
    assert (here / "result.json").read_text() == before


def test_other_settings_are_another_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(COMMAND) == 0
    assert _run([*COMMAND, "--lr", "0.5", "--name", "tiny-pipeoptim"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/tiny-pipeoptim exists and was begun with optimizer adamw {'lr': 0.01" in line
    assert "--new or --name" in line
    assert _run([*COMMAND, "--lr", "0.5", "--new"]) == 0
    assert _run([*COMMAND, "--new"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny-pipeoptim", "tiny-pipeoptim-2", "tiny-pipeoptim-3"]
    assert _run([*COMMAND, "--new", "--resume"]) == 2
    assert "--new belongs to a new run" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["emulator", "processes"])
@pytest.mark.parametrize("validated", [True, False])
def test_a_run_killed_behind_its_last_checkpoint_is_finished(
    engine: str, validated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run([*COMMAND, "--engine", engine, "--name", "cut"]) == 0
    where = Path("runs/cut")
    expected, rows = RunResult.read(where), timeless(where)
    (where / "result.json").unlink()
    (where / "loss.png").unlink()
    if not validated:
        lines = (where / "metrics.jsonl").read_text().splitlines()
        assert "val_loss" in lines[-1]
        (where / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert _run(["train", "--resume", "--name", "cut", "--quiet"]) == 0
    result = RunResult.read(where)
    assert (result.status, result.step) == ("finished", 24)
    assert (result.val_loss, result.val_metrics) == (expected.val_loss, expected.val_metrics)
    assert result.train_loss == pytest.approx(expected.train_loss)
    assert [s.updates for s in result.stages] == [24, 24]
    assert timeless(where) == rows
    assert (where / "loss.png").stat().st_size > 0
    capsys.readouterr()


def test_only_the_curve_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(COMMAND) == 0
    curve = Path("runs/tiny-pipeoptim/loss.png")
    curve.unlink()
    assert _run(COMMAND) == 0
    assert curve.stat().st_size > 0


def test_one_process_at_a_time(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with processes.train(tmp_path, "--recipe", "tiny:stuck", "--name", "mine") as command:
        where = tmp_path / "runs" / "mine"
        command.wait_for(lambda: where.exists() and len(timeless(where)) >= 5)
        for again in (["--resume"], ["--recipe", "tiny:stuck"]):
            assert _run(["train", *again, "--name", "mine"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"run runs/mine is in use by process {command.process.pid} on" in line
        command.process.kill()
        command.wait()
    with locked(where):  # the lock ends with its holder
        pass


def damage(text: bytes) -> None:
    Path("runs/tiny-pipeoptim/config.json").write_bytes(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"recipe": "tiny", ', "is not JSON"),
        (b'{"recipe": "\xff\xfe"}', "is not UTF-8 text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_a_damaged_configuration_is_one_sentence_with_the_file(
    text: bytes, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(COMMAND) == 0
    damage(text)
    for command in (["train", "--resume", "--name", "tiny-pipeoptim"], COMMAND):
        assert _run(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "runs/tiny-pipeoptim/config.json" in line
        assert words in line


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b'{"step": "many"}'])
def test_damaged_results_and_metrics_are_no_reason_to_fail(text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(COMMAND) == 0
    Path("runs/tiny-pipeoptim/result.json").write_bytes(text)
    with Path("runs/tiny-pipeoptim/metrics.jsonl").open("ab") as file:
        file.write(text)
    assert _run(COMMAND) == 0
    assert RunResult.read(Path("runs/tiny-pipeoptim")).step == 24


def test_a_checkpoint_of_a_later_version_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(COMMAND) == 0
    meta = Path("runs/tiny-pipeoptim/checkpoints/step-000024/meta.json")
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    before = sorted(p.name for p in meta.parent.parent.iterdir())
    assert _run(["train", "--resume", "--name", "tiny-pipeoptim"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-000024 was written by a later version of pipeoptim" in line
    assert sorted(p.name for p in meta.parent.parent.iterdir()) == before


@pytest.mark.parametrize("engine", ["emulator", "processes"])
def test_a_full_disk_is_one_sentence_with_its_cause(engine: str, tmp_path: Path) -> None:
    """Files of more than 6 KiB cannot be written: a checkpoint, that is."""
    command = " ".join([*processes.TRAIN, *COMMAND[1:], "--engine", engine, "--name", "full"])
    with processes.Command(["bash", "-c", f"ulimit -f 6; exec {command}"], tmp_path) as full:
        assert full.wait() == 1
        (line,) = full.err.splitlines()
        assert "step-000008 cannot be written (file too large" in line
    assert not list((tmp_path / "runs/full/checkpoints").glob("step-*"))
    with processes.Command(["bash", "-c", f"exec {command}"], tmp_path) as again:
        assert again.wait() == 0, again.err


def test_a_folder_that_cannot_be_made_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(3, monkeypatch)
    capsys.readouterr()
    Path("runs/tiny-pipeoptim/checkpoints").write_text("in the way")
    assert _run(COMMAND) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step-000008 cannot be written" in line
    assert "checkpoints" in line


def test_a_worker_whose_launcher_is_gone_before_it_began_ends(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    env = {**os.environ, "PIPEOPTIM_LAUNCHER": str(gone.pid)}
    worker = subprocess.run(
        [sys.executable, "-m", "pipeoptim.train.worker", "x"], env=env, cwd=tmp_path, timeout=60, check=False
    )
    assert worker.returncode == -9


def test_a_worker_that_python_cannot_interrupt_ends_with_its_launcher(tmp_path: Path) -> None:
    """The child holds the interpreter for a minute, so that no thread of it could look after its parent."""
    child = (
        "import ctypes, os; from pipeoptim.train.parent import end_with_parent; end_with_parent(); "
        "open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready'); ctypes.PyDLL(None).sleep(60)"
    )
    parent = (
        "import os, subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env={{**os.environ, 'PIPEOPTIM_LAUNCHER': str(os.getpid())}}); "
        "time.sleep(60)"
    )
    with processes.Command([sys.executable, "-c", parent], tmp_path) as command:
        command.wait_for(lambda: (tmp_path / "ready").exists())
        pid = int((tmp_path / "ready").read_text())
        assert processes.alive(pid)
        command.process.kill()
        command.wait()
        end = time.monotonic() + 10
        while processes.alive(pid):
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_run_that_is_not_there_is_not_begun_by_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="there is no run in"):
        run(tiny.recipe(), "runs/nothing", resume=True, progress=False)
    assert not Path("runs/nothing").exists()
    result = run(tiny.recipe(), "runs/something", resume=None, progress=False)
    assert result.status == "finished"


def test_a_run_is_exported_afterwards_as_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the tied weight, and with an export that is there already."""
    assert _run([*COMMAND, "--export", "--steps", "9", "--model", "tiny:tied"]) == 0
    here = Path("runs/tiny-pipeoptim")
    at_its_end = {path.name: path.read_bytes() for path in (here / "model").iterdir()}
    assert len(at_its_end) == 3
    for options, folder in (((), here / "model"), (("--out", "elsewhere"), Path("elsewhere"))):
        assert _run(["export", str(here), *options]) == 0
        assert f"{folder}: the weights after 9 mini-batches" in capsys.readouterr().out
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == at_its_end
    assert _run(["export", str(here), "--out", "elsewhere"]) == 2 and "exists already" in capsys.readouterr().err
    with locked(here):
        assert _run(["export", str(here)]) == 2 and "in use" in capsys.readouterr().err
    (here / "config.sig").unlink()
    assert _run(["export", str(here)]) == 2 and "neither this command line nor a registered recipe" in capsys.readouterr().err
    assert _run(["export", "nowhere"]) == 2 and "no run in nowhere" in capsys.readouterr().err
