"""Processes that are stopped for a while: a worker that does not come back ends the run in its name, a launcher that does ends nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import processes
import stage_processes
from compare import timeless

RUN = ["--recipe", "tiny:slow", "--engine", "processes", "--steps", "100000", "--name", "stopped"]


def newest_step(run: Path) -> int:
    rows = timeless(run)
    return rows[-1]["step"] if rows else 0


def test_a_frozen_stage_ends_the_run_soon_and_is_the_one_that_is_named(tmp_path: Path) -> None:
    where = tmp_path / "runs" / "stopped"
    with processes.train(tmp_path, *RUN) as command:
        command.wait_for(lambda: newest_step(where) > 42)
        pids = processes.worker_pids(where)
        os.kill(pids[1], signal.SIGSTOP)
        frozen, limit = time.monotonic(), 25 * stage_processes.slowness()
        assert command.wait(60 + limit) == 1
        assert (
            9 < time.monotonic() - frozen < limit
        )  # 10 s of silence; the agent alone would wait another 30 s for the frozen one
        assert len(command.err.splitlines()) == 1, command.err
        assert command.err.startswith("pipeoptim: stage 1 gave no sign of life for 10 s (seen by stage 0"), command.err
        assert not any(processes.alive(pid) for pid in pids.values())


def test_a_launcher_that_was_stopped_for_longer_than_that_ends_nothing(tmp_path: Path) -> None:
    where = tmp_path / "runs" / "stopped"
    with processes.train(tmp_path, *RUN) as command:
        command.wait_for(lambda: newest_step(where) > 42)
        command.process.send_signal(signal.SIGSTOP)
        time.sleep(13)
        command.process.send_signal(signal.SIGCONT)
        time.sleep(3)
        step = newest_step(where)
        command.wait_for(lambda: newest_step(where) > step + 20)
        pids = processes.worker_pids(where)
        assert all(processes.alive(pid) for pid in pids.values())
        command.interrupt()
        assert command.wait() == 130, command.err  # saved, and says how to go on
