"""``metrics.jsonl``: one JSON object per line, written as it happens, continued (never doubled) by a resumed run.

Training rows: step, loss, lr, samples_per_second. Validation rows: step, val_loss and one ``val_<name>`` per metric.
Prediction rows: step and prediction, a list with one entry per stage and parameter group (see
:mod:`pipeoptim.telemetry.prediction`). They may come a few rows later than the training row of their step.
``step`` counts mini-batches done, from 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

Row = dict[str, Any]


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
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """All rows; a last line that a crash cut off is left out."""
    return [row for _, row in _lines(path)]


def truncate_after(path: Path, step: int) -> None:
    """Remove the rows of steps after ``step``, which a resumed run will write again."""
    if not path.exists():
        return
    kept = [line for line, row in _lines(path) if row.get("step", 0) <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield line, row
