"""Runs that are predicted first, all of them, and then measured one by one: what simulated.py and simulated_real.py share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from pipeoptim.bench.record import Record, ResultRow, machine


class MeasuredRun(Protocol):
    """A run that is built from the ``run`` of a prediction."""

    def measure(self) -> float:
        """Mini-batches per second."""


def write_predictions(path: Path, predict: Callable[[], dict[str, Any]]) -> None:
    """Write what ``predict`` returns, with ``rows`` of a name, a run and what is predicted; never over a file that is there."""
    if path.exists():
        raise SystemExit(f"{path} exists; predictions are made once, before anything is measured")
    found = predict()
    data = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), **found}
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(found['rows'])} predictions in {path}")


def measure(
    predictions: Path,
    path: Path,
    benchmark: str,
    settings: dict[str, Any],
    run_of: Callable[[dict[str, Any]], MeasuredRun],
    repeats: int,
) -> None:
    """Measure what is predicted and not yet in the file at ``path``, which is whole after each run."""
    made = json.loads(predictions.read_text())
    settings = {"predicted": made["made"], "repeats": repeats, **settings}
    record = Record.read(path) if path.exists() else Record(benchmark, "mini-batches/s", settings, [])
    done = {row.name for row in record.rows}
    for row in made["rows"]:
        if row["name"] in done:
            continue
        run, samples, loads = run_of(row["run"]), [], []
        for _ in range(repeats):
            samples.append(run.measure())
            loads.append(os.getloadavg()[0])
        predicted = {key: value for key, value in row.items() if key not in ("name", "run")}
        record.rows.append(ResultRow(row["name"], samples, {**row["run"], **predicted, "load": max(loads)}))
        record.write(path)
        print(f"{row['name']}: predicted {row['predicted']:.4g}, measured {samples}", flush=True)


def show(path: Path) -> None:
    """Errors, relative to what was measured."""
    record = Record.read(path)
    errors = sorted(abs(row.settings["predicted"] / row.median - 1) for row in record.rows)
    for row in record.rows:
        print(f"{row.settings['predicted'] / row.median - 1:+7.1%}  {row.name}")
    print(f"{len(errors)} runs: median error {median(errors):.1%}, worst {errors[-1]:.1%}")
