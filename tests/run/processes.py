"""Commands as a user starts them, each with a time-out and an end: nothing that a test starts outlives it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).parent
TRAIN = [sys.executable, "-m", "pipeoptim", "train"]


class Command:
    """A command with its output in files; killed at the end of the ``with`` block if it still runs.

    ``outputs``: the folder of these files, where it is another one than that in which it is started.
    """

    def __init__(self, arguments: list[str], folder: Path, outputs: Path | None = None, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **environment}
        where = outputs or folder
        self._out, self._err = (where / "stdout.txt").open("w+"), (where / "stderr.txt").open("w+")
        self.process = subprocess.Popen(arguments, cwd=folder, env=env, stdout=self._out, stderr=self._err)

    def __enter__(self) -> Command:
        return self

    def wait(self, seconds: float = 90) -> int:
        """Exit code."""
        return self.process.wait(seconds)

    def wait_for(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Until ``what()`` is true; the command must not end before."""
        end = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.err}"
            assert time.monotonic() < end, f"not within {seconds} s; stderr: {self.err}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    @property
    def out(self) -> str:
        """stdout so far."""
        return Path(self._out.name).read_text()

    @property
    def err(self) -> str:
        """stderr so far."""
        return Path(self._err.name).read_text()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()  # its workers end with it
            self.process.wait(10)
        self._out.close()
        self._err.close()


def train(folder: Path, *arguments: str, **environment: str) -> Command:
    """``pipeoptim train ...`` in ``folder``."""
    return Command([*TRAIN, *arguments], folder, **environment)


def worker_pids(run: Path) -> dict[int, int]:
    """stage -> process id, of the last launch, as its processes told their logs."""
    launches = sorted(run.glob("logs/launch-*"))
    logs = sorted(launches[-1].glob("stage-*.err")) if launches else []
    found = [re.search(r"rank (\d+): process (\d+)", log.read_text()) for log in logs]
    return {int(match[1]): int(match[2]) for match in found if match}


def alive(pid: int) -> bool:
    """Whether that process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
