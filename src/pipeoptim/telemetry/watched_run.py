"""A run as its files show it, in this moment: read again and again, from where the last look ended."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import deque
from pathlib import Path
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import read_object
from pipeoptim.telemetry.metrics import check_rows_file

WINDOW = 20
"""Mini-batches that loss and speed are the mean of, as in the run itself."""

CURVE = 4096
"""Losses that are kept for the curve; of a longer run, every second one, then every fourth, ..."""


class WatchedRun:
    """What ``config.json``, ``metrics.jsonl``, ``result.json`` and ``lock`` of a run say.

    Nothing is locked, written or imported: the run may be of another user, on another machine.

    Args:
        folder: of the run.

    Attributes:
        losses: of the training, thinned out evenly.
        recent: the last rows of training.
        validations: (step, figures) of each, in order.
        prediction, timing: the newest measurements of each stage, by its number.

    Raises:
        ConfigError: it is none, or its rows are in no file.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"there is no run in {folder} (no config.json); check its name and the folder of the runs")
        check_rows_file(folder / "metrics.jsonl")
        self.folder, self.config = folder, read_object(folder / "config.json")
        self._forget()

    def _forget(self) -> None:
        self._read, self._every, self._seen = 0, 1, 0
        self.losses: list[float] = []
        self.recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.validations: list[tuple[int, dict[str, float]]] = []
        self.prediction: dict[int, dict[str, Any]] = {}
        self.timing: dict[int, dict[str, Any]] = {}

    def look(self) -> None:
        """Take in what has been written since the last look."""
        path = self.folder / "metrics.jsonl"
        try:
            self.config = read_object(self.folder / "config.json")  # of a run that was resumed with more steps
            size = path.stat().st_size
            if size < self._read:  # a resumed run has cut off the rows behind its checkpoint
                self._forget()
            with path.open("rb") as file:
                file.seek(self._read)
                text = file.read(size - self._read)
        except (OSError, ConfigError):  # it has not begun to write, or is just being replaced
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.recent.append(row)
            if self._seen % self._every == 0:
                self.losses.append(row["loss"])
            self._seen += 1
            if len(self.losses) > CURVE:
                self.losses, self._every = self.losses[::2], 2 * self._every
        elif "prediction" in row:
            for one in row["prediction"]:  # the worst of the stage's groups
                known = self.prediction.get(one["stage"])
                worse = known is None or known["version"] != one["version"] or _error(one) > _error(known)
                self.prediction |= {one["stage"]: one} if worse else {}
        elif "timing" in row:
            self.timing |= {one["stage"]: one for one in row["timing"]}
        elif any(name.startswith("val_") for name in row):
            self.validations.append((row["step"], {name: value for name, value in row.items() if name.startswith("val_")}))

    @property
    def step(self) -> int:
        """Mini-batches done."""
        return self.recent[-1]["step"] if self.recent else 0

    @property
    def steps(self) -> int:
        """Of the whole run; 0 where it will count them itself, from epochs."""
        return int(self.config.get("steps") or 0)

    @property
    def loss(self) -> float | None:
        """Mean of the last ones; of a run that has ended, what its result says."""
        ended = self._result().get("train_loss")
        if isinstance(ended, int | float):
            return ended
        return sum(row["loss"] for row in self.recent) / len(self.recent) if self.recent else None

    @property
    def rate(self) -> float:
        """Samples per second, lately; 0 where nothing is known."""
        return float(self.recent[-1].get("samples_per_second") or 0.0) if self.recent else 0.0

    @property
    def seconds_left(self) -> float | None:
        """By the present rate, validations and checkpoints aside; None where that is not known."""
        each = self.rate / max(1, int(self.config.get("batch_size") or 1))
        return (self.steps - self.step) / each if each > 0 and self.steps else None

    def status(self) -> str:
        """One phrase: running, finished, stopped, or ended without a result."""
        result = self._result()
        if result:
            return " ".join(
                filter(None, [str(result.get("status")), _bracketed(result.get("reason") or result.get("stopped_by"))])
            )
        holder = self._holder()
        if holder is None:
            return "not started"
        process, host = holder
        if host != socket.gethostname():
            return f"running on {host}, last row {self._age()}" if self._age() else f"starting on {host}"
        if not _alive(process):
            return "ended without a result: see its logs; the same command again continues it"
        return "running" if self.recent else "starting"

    def _result(self) -> dict[str, Any]:
        """Empty while there is none."""
        try:
            return read_object(self.folder / "result.json")
        except (OSError, ConfigError):
            return {}

    def _holder(self) -> tuple[int, str] | None:
        try:
            found = re.match(r"process (\d+) on (\S+)", (self.folder / "lock").read_text(errors="replace"))
        except OSError:
            return None
        return (int(found[1]), found[2]) if found else None

    def _age(self) -> str:
        try:
            return f"{max(0, time.time() - (self.folder / 'metrics.jsonl').stat().st_mtime):.0f} s ago"
        except OSError:
            return ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return not self.status().startswith(("running", "starting", "not started"))


def _error(one: dict[str, Any]) -> float:
    return float(one.get("relative_error") or 0.0)


def _bracketed(text: object) -> str:
    return f"({text})" if text else ""


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
