"""How wrong ``pipeoptim simulate`` is: predictions of all runs are written first, then the runs are measured one by one.

python benchmarks/simulated.py predict    measures the engine's own work and messages, writes benchmarks/results/simulated_predictions.json
python benchmarks/simulated.py measure    measures what is predicted and not measured yet; writes benchmarks/results/simulated.json
python benchmarks/simulated.py show       the errors
python benchmarks/simulated.py scale      what simulations of many stages take: benchmarks/results/simulated_scale.json

Stages are devices of fixed speed, which wait instead of computing, so that many of them fit on few cores. ``measure`` may be stopped at any
time and goes on where it was; a file of predictions that is there is never written again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from predicted_runs import measure, show, write_predictions

from pipeoptim.bench.link_profile import measure_link
from pipeoptim.bench.record import Record, ResultRow
from pipeoptim.bench.simulated import SimulatedRun

RESULTS = Path(__file__).parent / "results"
PREDICTIONS, MEASURED = "simulated_predictions.json", "simulated.json"
METHODS = ("gpipe", "1f1b", "naive", "pipedream", "pipeoptim")


def runs() -> list[SimulatedRun]:
    """Five methods at several D and M; then late messages, a slow stage and jitter."""
    found = [SimulatedRun(name, d, m) for name, (d, m) in product(METHODS, ((2, 1), (2, 4), (4, 4), (8, 8)))]
    found += [SimulatedRun("pipeoptim", 16, m, milliseconds=800, steps=45) for m in (1, 16)]
    found += [SimulatedRun(name, 4, 4, straggler=1.5) for name in METHODS]
    found += [SimulatedRun(name, 4, 4, delay=60.0) for name in METHODS]
    found += [SimulatedRun("pipeoptim", 4, 1, slack=x, delay=300.0) for x in (0.0, 1.0, 2.0)]
    found += [SimulatedRun(name, 4, 4, jitter=0.3) for name in METHODS]
    found += [SimulatedRun("pipeoptim", 8, 1, slack=x, jitter=0.3) for x in (0.0, 1.0)]
    return found


def predict() -> dict[str, Any]:
    """What all runs are expected to reach."""
    near, far = (measure_link(4, delay, waits=0.01) for delay in (0.0, 1e-3))
    rows = []
    for run in runs():
        rate = run.predict(far if run.delay else near).throughput
        rows.append({"name": run.name, "run": asdict(run), "predicted": rate.median, "low": rate.low, "high": rate.high})
    return {"rows": rows, "link": near._asdict(), "link through gloo": far._asdict()}


def scale(folder: Path) -> None:
    """Processor seconds and memory of the whole command, for 64 mini-batches."""
    record = Record(
        "simulate at scale", "s of one core", {"mini-batches": 64, "whole command": "imports and table as well"}, []
    )
    for stages in (100, 1000, 10_000):
        command = [
            sys.executable,
            "-m",
            "pipeoptim",
            "simulate",
            "--synthetic",
            "--stages",
            str(stages),
            "--mini-batches",
            "64",
        ]
        seconds, most = [], 0
        for _ in range(3):
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"{' '.join(command)} failed")
            seconds.append(used.ru_utime + used.ru_stime)
            most = max(most, used.ru_maxrss * 1024)
        record.rows.append(ResultRow(f"{stages:,} stages", seconds, {"stages": stages, "peak bytes": most}))
    record.write(folder / "simulated_scale.json")
    for row in record.rows:
        print(f"{row.name}: {row.median:.2f} s, {row.settings['peak bytes'] / 2**20:.0f} MiB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predict", "measure", "show", "scale"))
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where both files are")
    arguments = parser.parse_args()
    predictions, measured = arguments.folder / PREDICTIONS, arguments.folder / MEASURED
    if arguments.what == "predict":
        write_predictions(predictions, predict)
    elif arguments.what == "measure":
        settings = {"each stage": "stays on one core"}
        measure(predictions, measured, "simulated", settings, lambda run: SimulatedRun(**run))
    elif arguments.what == "show":
        show(measured)
    else:
        scale(arguments.folder)


if __name__ == "__main__":
    main()
