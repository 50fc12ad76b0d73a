"""Start one process per stage for a test, with a time-out on everything, and leave none behind."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path


def free_port() -> int:
    """A port that nobody listens on, of those that no outgoing connection is given before somebody does."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)  # ephemeral ports begin at 32768 on Linux
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            return port


def slowness() -> float:
    """How much longer than on an idle machine things may take now: processes that want a core, per core."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@contextmanager
def stages(script: Path, depth: int, *args: str):
    """Start ``script`` on ``depth`` processes with the environment that torchrun would give; reap them at the end."""
    port = str(free_port())
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(depth), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *args],
            env={**base, "RANK": str(k), "LOCAL_RANK": str(k)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(depth)
    ]
    try:
        yield started
    finally:
        for p in started:
            if p.poll() is None:
                p.kill()
            p.communicate()


def run(script: Path, depth: int, *args: str, timeout: float = 150) -> list[str]:
    """Run to the end; the output of every stage. Fails the test when one fails or the time is over, which is longer on a busy machine."""
    timeout *= slowness()
    with stages(script, depth, *args) as started:
        end, outputs = time.monotonic() + timeout, []
        for k, p in enumerate(started):
            try:
                out, err = p.communicate(timeout=max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"stage {k} did not end within {timeout:.0f} s") from None
            assert p.returncode == 0, f"stage {k} ended with {p.returncode}:\n{err[-3000:]}"
            outputs.append(out)
        return outputs
