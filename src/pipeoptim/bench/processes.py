"""Run a benchmark's function on one process per stage, with a fixed number of threads each, and collect what it returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeoptim.engine.processes.loopback import loopback_environment, loopback_store
from pipeoptim.errors import PipeOptimError

DELAY, BANDWIDTH = "PIPEOPTIM_BENCH_DELAY", "PIPEOPTIM_BENCH_BANDWIDTH"
"""Environment variables of a slow network: seconds, and bytes per second (0: no limit)."""


def run_on_processes(
    target: str,
    options: dict[str, Any],
    processes: int,
    threads: int,
    timeout: float,
    delay: float = 0.0,
    bandwidth: float = 0.0,
) -> list[Any]:
    """Call ``module:function(**options)`` in ``processes`` processes that share a gloo group.

    With ``delay`` (seconds) or ``bandwidth`` (bytes per second) its messages are late, see :mod:`pipeoptim.bench.slow`.

    Returns:
        What each returned, by rank; it must be JSON.

    Raises:
        PipeOptimError: a process failed or the time ran out; the others are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="pipeoptim-bench-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"target": target, "options": options, "threads": threads, "slow": bool(delay or bandwidth)}))
        store = loopback_store()
        base = {
            **os.environ,
            **loopback_environment(store),
            "WORLD_SIZE": str(processes),
            "OMP_NUM_THREADS": str(threads),
            DELAY: str(delay),
            BANDWIDTH: str(bandwidth),
        }
        command = [sys.executable, "-m", "pipeoptim.bench.worker", folder]
        started = [subprocess.Popen(command, env={**base, "RANK": str(rank)}) for rank in range(processes)]
        try:
            _wait(started, time.monotonic() + timeout, timeout)
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [json.loads((Path(folder) / f"result-{rank}.json").read_text()) for rank in range(processes)]


def _wait(started: list[subprocess.Popen[bytes]], end: float, timeout: float) -> None:
    while any(p.poll() is None for p in started):
        failed = [rank for rank, p in enumerate(started) if p.poll() not in (None, 0)]
        if failed:
            raise PipeOptimError(f"process {failed[0]} of the benchmark ended with code {started[failed[0]].returncode}")
        if time.monotonic() > end:
            raise PipeOptimError(f"the benchmark did not end within {timeout:g} s")
        time.sleep(0.05)
    failed = [rank for rank, p in enumerate(started) if p.returncode != 0]
    if failed:
        raise PipeOptimError(f"process {failed[0]} of the benchmark ended with code {started[failed[0]].returncode}")
