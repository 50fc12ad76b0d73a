"""Executes the runs of a comparison in parallel worker processes, with one progress bar for all; Ctrl-C ends them at once.

Each worker is served by a thread that hands it one run at a time. A worker that dies (memory, a bug in torch) costs its run,
not the comparison: the next run gets a new one.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pipeoptim.compare.folder import ComparisonFolder, write_text
from pipeoptim.compare.plan import PlannedRun
from pipeoptim.compare.progress import Progress
from pipeoptim.compare.worker import OUTCOME, READY
from pipeoptim.train.parent import LAUNCHER

#: Seconds that a worker gets to end before it is killed.
PATIENCE = 10.0


def do_runs(folder: ComparisonFolder, runs: Sequence[PlannedRun], jobs: int, progress: Progress) -> None:
    """Do ``runs``, ``jobs`` at a time. How each ended is in its folder.

    Raises:
        KeyboardInterrupt: Ctrl-C; no worker is left.
    """
    todo: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for run in runs:
        todo.put(run)
    servers = [_Server(folder, todo, progress, n) for n in range(min(jobs, len(runs)))]
    try:
        for server in servers:
            server.start()
        while any(server.is_alive() for server in servers):
            progress.look()
            servers[0].join(0.2) if servers[0].is_alive() else servers[-1].join(0.2)
    finally:
        for server in servers:
            server.end()
        for server in servers:
            server.join()
    for server in servers:
        if server.error is not None:
            raise server.error


class _Server(threading.Thread):
    """Hands runs to one worker process."""

    def __init__(self, folder: ComparisonFolder, todo: queue.SimpleQueue[PlannedRun], progress: Progress, number: int) -> None:
        super().__init__(name=f"pipeoptim-compare-{number}", daemon=True)
        self.folder, self.todo, self.progress, self.number = folder, todo, progress, number
        self.worker: subprocess.Popen[str] | None = None
        self.lock, self.ended = threading.Lock(), False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until no run is left, or ended."""
        try:
            while not self.ended:
                try:
                    run = self.todo.get_nowait()
                except queue.Empty:
                    break
                self.progress.began(run)
                self._do(run)
                if not self.ended:
                    self.progress.ended(run)
        except BaseException as error:  # reaches the user through do_runs
            self.error = error
        finally:
            self.end()

    def _do(self, run: PlannedRun) -> None:
        path = self.folder.run(run.name)
        worker = self._worker()
        if worker is None:
            return
        assert worker.stdin and worker.stdout
        order = {"folder": str(path), "config": json.loads(run.config.to_json())}
        with suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(order) + "\n")
            worker.stdin.flush()
        for line in worker.stdout:
            if line.startswith(READY):
                return
        if not self.ended:
            self._died(worker, path)

    def _died(self, worker: subprocess.Popen[str], path: Path) -> None:
        code = worker.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        path.mkdir(parents=True, exist_ok=True)
        reason = f"its process was {how} (log: {self._log})" if code < 0 else f"its process {how} (log: {self._log})"
        write_text(path / OUTCOME, json.dumps({"status": "failed", "reason": reason}) + "\n")

    @property
    def _log(self) -> Path:
        return self.folder.logs / f"worker-{self.number}.err"

    def _worker(self) -> subprocess.Popen[str] | None:
        """The running worker, or a new one; None once ended."""
        with self.lock:
            if self.ended:
                return None
            if self.worker is None or self.worker.poll() is not None:
                self._log.parent.mkdir(exist_ok=True)
                with self._log.open("a") as log:
                    self.worker = subprocess.Popen(
                        [sys.executable, "-m", "pipeoptim.compare.worker"],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                        env={
                            **os.environ,
                            "OMP_NUM_THREADS": "1",
                            LAUNCHER: str(os.getpid()),
                            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                        },
                        start_new_session=True,  # Ctrl-C in the terminal reaches the command only
                    )
            return self.worker

    def end(self) -> None:
        """End the worker. May be called from any thread, and again."""
        with self.lock:
            self.ended = True
            worker = self.worker
        if worker is None:
            return
        if worker.poll() is None:
            worker.terminate()
            try:
                worker.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
