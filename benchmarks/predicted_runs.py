"""Runs that are predicted first, all of them, and then measured one by one: what simulated.py and simulated_real.py share."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from pipeoptim.bench.other_work import OtherWork
from pipeoptim.bench.record import Record, ResultRow, machine
from pipeoptim.bench.simulated import error_of
from pipeoptim.files import write_durably

MOST_OTHER, TRIES = 0.05, 3
"""Cores that other work may have taken in a run that shall have its cores for itself, and how often it is tried."""


class MeasuredRun(Protocol):
    """A run that is built from the ``run`` of a prediction."""

    def measure(self) -> float:
        """Mini-batches per second."""


def write_predictions(path: Path, predict: Callable[[], dict[str, Any]]) -> None:
    """Write what ``predict`` returns, with ``rows`` of a name, a run and what is predicted; never over a file that is there."""
    if path.exists():
        raise SystemExit(f"{path} exists; predictions are made once, before anything is measured")
    found = predict()
    _write(path, {"made": _now(), "machine": machine(), **found})
    print(f"{len(found['rows'])} predictions in {path}")


def add_predictions(path: Path, part: str, predict: Callable[[], dict[str, Any]]) -> None:
    """As :func:`write_predictions`, for one part of the runs; what is there of it is never written again."""
    data: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"made": "", "machine": machine(), "rows": [], "parts": {}}
    )
    if part in data["parts"]:
        return
    found = predict()
    made = _now()
    data["rows"] += found.pop("rows")
    data["parts"][part] = {"made": made, **found}
    data["made"] = data["made"] or f"{made} and later, each model right before its runs"
    _write(path, data)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all: who stops the script loses what is not written yet, and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(data, indent=1) + "\n")


def measure(
    predictions: Path,
    path: Path,
    benchmark: str,
    settings: dict[str, Any],
    run_of: Callable[[dict[str, Any]], MeasuredRun],
    alone: bool = False,
) -> None:
    """Measure what is predicted and not yet in the file at ``path``, which is whole after each run.

    A run that is predicted several times is measured after each of its predictions, and its row has both of each time. With ``alone`` a run
    that other work disturbed is measured again; of as many as are tried the least disturbed one counts.
    """
    made = json.loads(predictions.read_text())
    settings = {"predicted": made["made"], **settings}
    record = Record.read(path) if path.exists() else Record(benchmark, "mini-batches/s", settings, [])
    times: Counter[str] = Counter()
    for one in made["rows"]:
        row = record.row_or_new(one["name"])
        times[row.name] += 1
        if times[row.name] <= len(row.samples):
            continue
        rate, other = undisturbed(run_of(one["run"]).measure, TRIES if alone else 1)
        row.samples.append(rate)
        row.settings.update(one["run"], predicted=[*row.settings.get("predicted", []), one["predicted"]])
        _worst(row, "load", os.getloadavg()[0])
        if alone:
            _worst(row, "other cores", other)
        record.write(path)
        print(f"{row.name}: predicted {one['predicted']:.4g}, measured {rate:.4g}, others {other:.2f}", flush=True)


def _worst(row: ResultRow, what: str, value: float) -> None:
    row.settings[what] = max(value, row.settings.get(what, value))


def undisturbed(measured: Callable[[], Any], tries: int = TRIES) -> tuple[Any, float]:
    """What ``measured`` returns when other work takes next to nothing, or least of all tries; and the cores that it took."""
    found: list[tuple[Any, float]] = []
    while len(found) < tries:
        with OtherWork() as other:
            result = measured()
        found.append((result, other.cores))
        if other.cores <= MOST_OTHER:
            break
    return min(found, key=lambda one: one[1])


def show(path: Path) -> None:
    """Errors, relative to what was measured."""
    record = Record.read(path)
    errors = sorted(abs(error_of(row)) for row in record.rows)
    for row in record.rows:
        print(f"{error_of(row):+7.1%}  {row.name}")
    print(f"{len(errors)} runs: median error {median(errors):.1%}, worst {errors[-1]:.1%}")
