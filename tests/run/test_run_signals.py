"""A run that is asked to stop by a scheduler's signal, at whatever moment, goes on later as if it had never been stopped, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import processes
import tiny
from compare import assert_same_state, timeless
from pipeoptim.checkpoint import background_writer
from pipeoptim.config import TrainConfig, read_signals
from pipeoptim.engine.emulator import Emulator
from pipeoptim.errors import ConfigError
from pipeoptim.train import run
from pipeoptim.train.result import RunResult

MOMENTS: dict[str, tuple[Any, str, int]] = {  # what is called, and in which call the signal comes; the first batch is a probe
    "set-up": (tiny, "model", 0),
    "the first mini-batch": (tiny.Task, "train_batch", 1),
    "a later one": (tiny.Task, "train_batch", 11),
    "a loss": (tiny.Task, "loss", 8),
    "a validation": (tiny.Task, "metrics", 1),
    "a drain": (Emulator, "_run_drain", 0),
    "a checkpoint": (background_writer, "pack_stage", 1),
    "the last mini-batch": (tiny.Task, "train_batch", 24),
}


def signalled(config: TrainConfig, folder: Path, place: Any, name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> RunResult:
    """Run ``config``; a SIGTERM comes, twice, as the function ``name`` is called for the ``at``-th time."""
    calls, before = [], getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(name)
        return before(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        result = run(config, folder, progress=False)
    assert len(calls) > at, f"{name} was not called"
    return result


CONFIG = replace(tiny.recipe(), method="pipeoptim", stages=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    run(CONFIG, folder, progress=False)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_costs_nothing(
    moment: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    result = signalled(CONFIG, tmp_path / "halves", *MOMENTS[moment], monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is before
    if result.status == "stopped":
        assert result.stopped_by == RunResult.read(tmp_path / "halves").stopped_by == "SIGTERM"
        assert result.step in (0, 8, 16)
        assert run(CONFIG, tmp_path / "halves", resume=None, progress=False).status == "finished"
    assert (moment == "the last mini-batch") == (result.status == "finished")
    assert_same_state(whole, tmp_path / "halves")
    assert timeless(whole) == timeless(tmp_path / "halves")


def test_without_time_for_the_next_checkpoint_it_stops_after_the_mini_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronous methods lose nothing by it; asynchronous ones go on from there, and the run says that it is not bit for bit."""
    for method, exact in (("1f1b", True), ("pipeoptim", False)):
        config, folder = replace(tiny.recipe(), method=method, grace=0), tmp_path / method
        run(config, tmp_path / f"{method}-whole", progress=False)
        with monkeypatch.context() as patch:  # the time is up before the mini-batch is, but this process must not end
            patch.setattr("pipeoptim.train.signals.StopSignals._tell_late", lambda _: None)
            result = signalled(config, folder, tiny.Task, "train_batch", 10, monkeypatch)
        assert (result.status, result.step) == ("stopped", 11)
        assert run(config, folder, resume=True, progress=False).status == "finished"
        if exact:
            assert_same_state(tmp_path / f"{method}-whole", folder)
        else:
            with pytest.raises(AssertionError, match="differs"):
                assert_same_state(tmp_path / f"{method}-whole", folder)


def test_one_process_or_all_are_told(tmp_path: Path) -> None:
    """SIGTERM to the last stage's process alone; then SIGUSR1 to all of them, and to the launcher before they have begun."""
    where = tmp_path / "runs" / "told"
    options = ["--recipe", "tiny:slow", "--engine", "processes", "--name", "told"]
    with processes.train(tmp_path, *options) as command:
        command.wait_for(lambda: len(timeless(where)) > 3)
        os.kill(processes.worker_pids(where)[1], signal.SIGTERM)
        assert command.wait(30) == 143, command.err
        assert "stopped at step 40; resume with: pipeoptim train --resume --name told" in command.out
        assert "SIGTERM: stops at step 40, the next checkpoint" in command.out
    with processes.train(tmp_path, *options) as command:
        command.wait_for(lambda: len(list(where.glob("logs/launch-2/*.err"))) == 2)
        command.process.send_signal(signal.SIGUSR1)
        command.wait_for(lambda: len(processes.worker_pids(where)) == 2)
        for pid in (command.process.pid, *processes.worker_pids(where).values()):
            os.kill(pid, signal.SIGUSR1)
        assert command.wait(30) == 138, command.err
        assert "stopped at step" in command.out
    run(tiny.slow(), where, resume=True, progress=False)
    run(tiny.slow(), tmp_path / "whole", progress=False)
    assert_same_state(where, tmp_path / "whole")


@pytest.mark.parametrize("options", [[], ["--engine", "processes", "--survive", "4"]], ids=["emulator", "survive"])
def test_a_grace_time_that_is_too_short_is_told(options: list[str], tmp_path: Path) -> None:
    """Data that hang: nothing can be saved, and the process ends in time."""
    run_dir = tmp_path / "runs" / "late"
    with processes.train(tmp_path, "--recipe", "tiny:stuck", "--name", "late", "--grace", "1", *options) as command:
        command.wait_for(lambda: len(timeless(run_dir)) >= 5)
        command.process.terminate()
        try:
            assert command.wait(20) == 143
        except subprocess.TimeoutExpired:
            pytest.fail("it did not end")
        assert "no checkpoint could be reached within the grace time of 1 s after SIGTERM; resume" in command.err
        for listing in run_dir.glob("logs/*/processes.json"):
            for pid in json.loads(listing.read_text())["processes"].values():
                while processes.alive(pid):  # the kernel ends it with the command
                    time.sleep(0.01)


def test_names_of_signals() -> None:
    assert read_signals("term, SIGUSR1,TERM") == (signal.SIGTERM, signal.SIGUSR1)
    assert read_signals("") == ()
    for name in ("KILL", "INT", "TERM,", "x", "DFL"):
        with pytest.raises(ConfigError, match="stop_signals is"):
            read_signals(name)
