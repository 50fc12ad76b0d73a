"""Processes that are stopped for a while: a launcher that comes back ends nothing, a worker that does not ends the run in its name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import processes
import stage_processes
from compare import timeless

RUN = ["--recipe", "tiny:slow", "--engine", "processes", "--steps", "100000", "--name", "stopped"]
SILENCE = 10  # seconds after which a stage counts as dead
PAUSE = (
    20  # of the launcher, which holds the store: twice as long, and longer than any other wait of the watch (40 beats of 0.5 s)
)


def newest_step(run: Path) -> int:
    rows = timeless(run)
    return rows[-1]["step"] if rows else 0


def test_a_stopped_launcher_ends_nothing_and_a_frozen_stage_ends_the_run_soon_and_is_named(tmp_path: Path) -> None:
    """One run for both, for it is the start of the processes that takes long."""
    where = tmp_path / "runs" / "stopped"
    with processes.train(tmp_path, *RUN) as command:
        command.wait_for(lambda: newest_step(where) > 42)
        command.process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE)
        command.process.send_signal(signal.SIGCONT)
        time.sleep(3)  # a wrong verdict of the watch would come with its first looks
        step = newest_step(where)
        command.wait_for(lambda: newest_step(where) > step + 20)
        pids = processes.worker_pids(where)
        assert all(processes.alive(pid) for pid in pids.values())

        os.kill(pids[1], signal.SIGSTOP)
        frozen, limit = time.monotonic(), 25 * stage_processes.slowness()
        assert command.wait(60 + limit) == 1
        # The agent alone would wait another 30 s for the frozen one.
        assert SILENCE - 1 < time.monotonic() - frozen < limit
        assert len(command.err.splitlines()) == 1, command.err
        assert command.err.startswith(f"pipeoptim: stage 1 gave no sign of life for {SILENCE} s (seen by stage 0"), command.err
        assert not any(processes.alive(pid) for pid in pids.values())
