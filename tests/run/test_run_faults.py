"""Sentences become failures at the right instant; those that can never happen are refused; the table says what came of them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import processes
import tiny
from compare import timeless
from pipeoptim.checkpoint.write_checkpoint import CheckpointWriteError
from pipeoptim.cli.commands import faults as faults_command
from pipeoptim.config import TrainConfig
from pipeoptim.errors import ConfigError, CorruptionError
from pipeoptim.faults import inject, random_faults, read_fault, trial
from pipeoptim.faults.promise import Promise, check_possible, promise, step_of
from pipeoptim.faults.records import FaultRecords
from pipeoptim.faults.same_end import end_of, same
from pipeoptim.faults.sentences import SENTENCES
from pipeoptim.train import run
from pipeoptim.train.signals import AbortedError

SAID = [
    "kill stage 1 at forward 3",
    "kill stage 0 at backward 5",
    "kill stage 0 at update 9",
    "freeze stage 1 for 0.5 s at validation 2",
    "kill stage 1 at checkpoint 3",
    "flip a bit in stage 0's gradient at 7",
    "disk full at checkpoint 2",
    "make the loss nan at 12",
    "flip a bit in stage 1's weights at 11",
    "kill stage 0 at send 15",
    "kill stage 1 at image 2",
]


def injected(config: TrainConfig, sentences: Sequence[str], folder: Path) -> FaultRecords:
    """Train ``config`` in this process, with failures."""
    records = FaultRecords(folder / "faults")
    stage_of = {"disk": 0, "nan": 1}
    planned = [read_fault(sentence) for sentence in sentences]
    records.plan([(one, stage_of.get(one.kind, one.stage or 0), step_of(config, one)) for one in planned])
    run(config, folder / "run", progress=False, callbacks=[inject.Inject()])
    return records


def test_sentences_say_what_was_read() -> None:
    assert [str(read_fault(f"  {sentence} ")) for sentence in SAID] == SAID
    assert {read_fault(sentence).kind for sentence in SAID} == set(SENTENCES) == set(inject.INJECT)


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("kill everybody", "is no failure; say one of: kill stage K at EVENT N; freeze"),
        ("kill stage 1 at upd 3", "unknown event 'upd'; did you mean 'update'"),
        ("kill stage 2 at forward 3", "the run has stages 0 .. 1; name one"),
        ("kill stage 1 at forward 24", "mini-batches 0 .. 23"),
        ("kill stage 1 at image 2", "leave images of themselves with --survive only"),
        ("disk full at checkpoint 4", "3 checkpoints, counted from 1"),
        ("freeze stage 0 for 0 s at update 3", "seconds must be above 0"),
    ],
)
def test_what_says_nothing_or_can_never_happen_is_refused(sentence: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_possible(tiny.recipe(), [read_fault(sentence)])


def test_a_single_stage_sends_nothing_and_the_last_image_has_a_number() -> None:
    with pytest.raises(ConfigError, match="a single stage sends nothing"):
        check_possible(replace(tiny.recipe(), stages=1), [read_fault("kill stage 0 at send 3")])
    config = replace(tiny.recipe(), engine="processes", survive=4)
    check_possible(config, [read_fault("kill stage 0 at image 5")])
    with pytest.raises(ConfigError, match="the run has 5 images, counted from 1"):  # of 24 mini-batches, 4, 8, .. 20
        check_possible(config, [read_fault("kill stage 0 at image 6")])


def test_more_failures_than_restarts_are_refused() -> None:
    config = replace(tiny.recipe(), max_restarts=1)
    with pytest.raises(ConfigError, match="2 failures need a restart each, but max_restarts is 1"):
        check_possible(config, [read_fault(sentence) for sentence in ("kill stage 0 at update 3", "disk full at checkpoint 2")])


@pytest.mark.parametrize("options", [{"max_restarts": 3}, {"engine": "processes", "survive": 4}])
def test_a_storm_is_the_same_again_and_promised_to_be_survived(options: dict[str, Any]) -> None:
    config = replace(tiny.recipe(), **options)
    faults = random_faults(config, 3, seed=5)
    assert faults == random_faults(config, 3, seed=5) != random_faults(config, 3, seed=6)
    check_possible(config, faults)
    assert {promise(config, fault) for fault in faults} == {Promise.SAME_BITS}
    with pytest.raises(ConfigError, match="room for"):
        random_faults(config, 24, seed=5)
    with pytest.raises(ConfigError, match="has no storm; give --survive K or --max-restarts N"):
        random_faults(tiny.recipe(), 1, seed=5)


def test_failures_come_just_before_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[tuple[int, int]]()
    monkeypatch.setattr(
        inject, "INJECT", dict.fromkeys(inject.INJECT, lambda worker: seen.append((worker.k, worker.weights.version)))
    )
    records = injected(tiny.recipe(), [SAID[9], *SAID[:5]], tmp_path)
    # Stage and its updates so far: one less than the forward's number on stage 0, whose gap is 1; all of them where it is drained.
    assert seen == [(1, 3), (0, 5), (0, 9), (1, 12), (0, 14), (1, 24)]
    assert [records.recovered(index).repeated for index in range(5)] == [0] * 5  # type: ignore[union-attr]
    assert records.recovered(5) is None  # there was no mini-batch left
    run(tiny.recipe(), tmp_path / "whole", progress=False)
    assert same(end_of(tmp_path / "run"), end_of(tmp_path / "whole"))


def test_a_flipped_bit_a_loss_that_is_nan_and_a_full_disk(tmp_path: Path) -> None:
    config = replace(tiny.recipe(), on_bad="skip")
    run(config, tmp_path / "whole", progress=False)
    injected(config, SAID[5:6], tmp_path / "flip")
    whole, flipped = (timeless(folder) for folder in (tmp_path / "whole", tmp_path / "flip" / "run"))
    assert whole != flipped
    assert whole[:7] == flipped[:7]
    injected(config, SAID[7:8], tmp_path / "nan")
    assert [row["step"] for row in timeless(tmp_path / "nan" / "run") if row.get("skipped")] == [13]
    for audit, found in ((0, nullcontext()), (4, pytest.raises(CorruptionError, match="update 12 of stage 1"))):
        with found:
            injected(replace(tiny.recipe(), audit=audit), SAID[8:9], tmp_path / f"weights-{audit}")
        assert promise(replace(config, audit=audit, max_restarts=1), read_fault(SAID[8])) is (
            Promise.SAME_BITS if audit else Promise.NOTHING
        )
    with pytest.raises(CheckpointWriteError, match="step-000016 cannot be written .*[Nn]o space left"):
        injected(config, SAID[6:7], tmp_path / "disk")


def test_a_promise_is_kept_or_not() -> None:
    def row(promised: Promise, survived: bool, equal: bool, fired: bool = True) -> bool:
        return trial.FaultRow("kill", promised, fired, survived, equal, 0.1, 3).kept

    assert row(Promise.SAME_BITS, True, True)
    assert not row(Promise.SAME_BITS, True, False)
    assert row(Promise.GOES_ON, True, False)
    assert not row(Promise.GOES_ON, False, False)
    assert row(Promise.NOTHING, False, False)
    assert not row(Promise.NOTHING, False, False, fired=False)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "say what fails"),
        (["--storm", "2", "kill stage 0 at update 3"], "one of both"),
        (["--seed", "2", "kill stage 0 at update 3"], "seed is 2, but sentences"),
        (["kill stage 0 at update 3", "--", "--name", "x"], "--name is not for pipeoptim faults"),
        (
            ["kill stage 0 at update 3", "--", "--nnodes=2", "--node-rank", "0"],
            "--nnodes=2 is not for pipeoptim faults, whose runs",
        ),
        (["kill stage 0 at update 3", "--", "--help"], "see --out before -- and pipeoptim train --help"),
        (["kill stage 0 at update 3", "--", "--recipe", "digits", "--lr", "-1"], "lr"),
    ],
)
def test_command_lines_that_are_refused(words: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeoptim.cli.app import _run

    assert _run(["faults", *words]) == 2
    assert reason in capsys.readouterr().err


def test_torchrun_starts_no_runs_that_fail_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="call it without torchrun"):
        faults_command.faults(["kill stage 0 at update 3"])


def test_a_run_that_is_hit_ends_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def emulated(config: TrainConfig, folder: Path, say: object) -> None:
        run(replace(config, engine="emulator", survive=0), folder / "undisturbed", progress=False)

    monkeypatch.setattr(trial, "train_undisturbed", emulated)  # the same bits, and two processes less
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(processes.HERE), os.environ.get("PYTHONPATH", "")])))
    config = replace(tiny.recipe(), engine="processes", survive=4)
    faults = [read_fault("kill stage 1 at update 9"), read_fault("freeze stage 0 for 0.3 s at forward 18")]
    faults.append(read_fault("kill stage 0 at image 3"))
    told = list[str]()
    folder = "hit (by 2), isn't it"
    killed, frozen, forked = trial.try_faults(config, faults, tmp_path / folder, told.append)
    assert killed.survived and killed.bit_equal and frozen.survived and frozen.bit_equal
    assert (
        killed.repeated is not None and 2 <= killed.repeated <= 10
    )  # since mini-batch 8, 4 or 0, the newest image that was ready
    # Its newest image was made a moment before, or does not come in time; and may have died while it caught up with the other.
    assert forked.survived and forked.bit_equal and forked.repeated is not None and forked.repeated <= 8
    assert frozen.repeated == 0 and frozen.seconds is not None and frozen.seconds >= 0.3
    assert sorted(text for text in told if text.startswith("now")) == sorted(f"now: {fault}" for fault in faults)
    told_again = json.loads((tmp_path / folder / "faults.json").read_text())
    assert [row["kept"] for row in told_again] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_ends_with_the_command_that_watches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    run, told = tmp_path / "run.sh", tmp_path / "pid"
    run.write_text(f"#!/bin/sh\necho $$ > {told}.part; mv {told}.part {told}; exec sleep 60\n")
    run.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(run))
    command = os.fork()
    if not command:
        try:
            trial.train_undisturbed(tiny.recipe(), tmp_path, lambda text: None)
        except AbortedError as error:
            os._exit(error.number)
        finally:
            os._exit(99)
    while not told.exists():
        time.sleep(0.01)
    os.kill(command, number)
    status = os.waitpid(command, 0)[1]
    assert (os.WTERMSIG(status) if number == signal.SIGKILL else os.WEXITSTATUS(status)) == number
    end = time.monotonic() + 10
    while processes.alive(int(told.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [
        trial.FaultRow("kill stage 1 at update 9", Promise.SAME_BITS, True, True, True, 0.257, 3),
        trial.FaultRow("make the loss nan at 12", Promise.NOTHING, True, False, False, None, None),
        trial.FaultRow("kill stage 1 at update 99", Promise.NOTHING, False, False, False, None, None),
    ]
    faults_command._show(rows, Path("runs/faults"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == [row.fault for row in rows]
    assert lines[1].split()[-4:] == ["yes", "yes", "0.26", "3"]
    assert "no (not promised)" in lines[2]
    assert "never happened" in lines[3]
    assert "2 of 3 as promised" in lines[-1]
