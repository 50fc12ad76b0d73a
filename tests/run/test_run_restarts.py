"""A run whose processes die starts again by itself, and ends with the bits of one that was never disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import processes
import tiny
from compare import assert_equal_to_undisturbed, timeless
from pipeoptim.errors import ConfigError, StageFailure
from pipeoptim.train import run
from pipeoptim.train.restarts import with_restarts
from pipeoptim.train.rundir import Start
from pipeoptim.train.signals import AbortedError, StopSignals


def test_a_run_survives_a_kill_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    where = tmp_path / "runs" / "victim"
    newest = where / "checkpoints" / "step-000080"
    with processes.train(
        tmp_path, "--recipe", "tiny:slow", "--engine", "processes", "--name", "victim", "--max-restarts", "3"
    ) as command:
        command.wait_for(lambda: newest.exists() and timeless(where)[-1]["step"] > 82)
        damaged = bytearray((newest / "stage-1.safetensors").read_bytes())
        damaged[-1] ^= 1
        (newest / "stage-1.safetensors").write_bytes(damaged)
        os.kill(processes.worker_pids(where)[1], signal.SIGKILL)
        assert command.wait() == 0, command.err
    lines = command.err.splitlines()
    assert len(lines) == 2, command.err
    assert lines[0].startswith(f"checkpoint {newest.relative_to(tmp_path)} is torn (stage-1.safetensors has another SHA-256")
    assert lines[1].startswith("restart 1 of 3, from step 40: stage 1 failed: killed by SIGKILL")
    assert "finished at step 120 of 120" in command.out
    assert_equal_to_undisturbed(where, tiny.slow(), tmp_path / "whole")


def test_it_gives_up_where_nothing_is_gained_and_when_it_has_tried_often_enough() -> None:
    said: list[str] = []
    starts: list[int] = []

    def fail(start: Start) -> None:
        starts.append(start.step)
        raise StageFailure("stage 1 failed: killed by SIGKILL")

    def restarted(most: int, *steps: int, stop: StopSignals | None = None) -> None:
        starts.clear()
        said.clear()
        found = iter(steps)
        with_restarts(most, Start(), fail, lambda: Start(next(found)), stop or Stopwatch(), said.append)  # type: ignore[arg-type]

    with pytest.raises(StageFailure, match=r"^stage 1 failed: killed by SIGKILL$"):
        restarted(0)
    with pytest.raises(StageFailure, match="killed by SIGKILL, after 2 restarts"):
        restarted(2, 0, 8)
    assert starts == [0, 0, 8]
    assert said[1] == "restart 2 of 2, from step 8: stage 1 failed: killed by SIGKILL"
    patient = Stopwatch()
    with pytest.raises(StageFailure, match="given up, since 3 attempts in a row .* after step 8"):
        restarted(9, 0, 0, 8, 8, 8, 8, stop=patient)
    assert starts == [0, 0, 0, 8, 8, 8]
    assert patient.waited == [1, 2, 0, 1, 2]
    told = Stopwatch()
    told.number = signal.SIGTERM
    with pytest.raises(AbortedError, match="SIGTERM came after a failure") as aborted:
        restarted(9, 8, stop=told)
    assert aborted.value.number == signal.SIGTERM


class Stopwatch(StopSignals):
    """Does not wait."""

    def __init__(self) -> None:
        super().__init__((), 0)
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        return self.wanted


def test_what_fails_by_itself_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="give --max-restarts to torchrun"):
        run(tiny.replace(tiny.recipe(), engine="processes", max_restarts=2), tmp_path / "run")
