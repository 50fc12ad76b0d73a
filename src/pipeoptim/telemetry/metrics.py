"""``metrics.jsonl``: one JSON object per line, written as it happens, continued (never doubled) by a resumed run.

Training rows: step, loss, lr, samples_per_second; or step and ``skipped``, where the mini-batch was bad and was left
out. Validation rows: step, val_loss and one ``val_<name>`` per metric.
Prediction rows: step and prediction, a list with one entry per stage and parameter group (see
:mod:`pipeoptim.telemetry.prediction`). They may come a few rows later than the training row of their step.
Timing rows: step and timing, a list with one entry per stage (:class:`~pipeoptim.engine.stage_times.StageTimes`), and under AdaGC how many
tensors of the stage it has scaled so far (``clipped``).
``step`` counts mini-batches done, from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from types import TracebackType
from typing import Any

from pipeoptim.errors import ConfigError
from pipeoptim.files import sync_file, sync_folder

Row = dict[str, Any]

TAIL = 0.05
"""Share of the steps that a run's train loss is the mean of, wherever it is told."""


class MetricsFile:
    """Appends rows to ``path``; every row reaches the file before the next step."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """One row.

        Raises:
            ValueError: a value that JSON does not have (NaN, infinity).
        """
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        # To the system, not to the disk: a crash of the process loses nothing, and a step does not wait for a disk.
        self._file.flush()

    def sync(self) -> None:
        """All rows so far reach the disk, not only the file."""
        sync_file(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def check_rows_file(path: Path) -> None:
    """Raises ConfigError where rows are in a device, which has no end (/dev/zero) or keeps nothing (/dev/null), or in a folder."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file, so that the rows of the run cannot be in it; remove it, or restore it")


def read_rows(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut off is left out.

    Raises:
        ConfigError: ``path`` is something else than a file.
    """
    return [row for _, row in _lines(path)]


def train_losses(rows: Sequence[Row]) -> list[float]:
    """Of all mini-batches whose loss was finite."""
    return [row["loss"] for row in rows if "loss" in row]


def tail_mean(values: Sequence[float]) -> float | None:
    """Mean of the last 5 % of ``values``, at least one; None for none.

    >>> tail_mean([9.0] * 38 + [1.0, 3.0])
    2.0
    """
    return mean(values[-max(1, round(TAIL * len(values))) :]) if values else None


def truncate_after(path: Path, step: int) -> None:
    """Remove the rows of steps after ``step``, which a resumed run will write again.

    Raises:
        ConfigError: ``path`` is something else than a file.
    """
    if not path.exists():
        return
    kept = [line for line, row in _lines(path) if row.get("step", 0) <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        sync_file(file.fileno())
    # Atomic: a crash leaves either the old rows or the kept ones.
    temporary.replace(path)
    sync_folder(path.parent)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    check_rows_file(path)
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        # A line that a crash cut off.
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step", 0), int):
            yield line, row
