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
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median

from pipeoptim.bench.link_profile import measure_link
from pipeoptim.bench.record import Record, ResultRow, machine
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


def predict(folder: Path) -> None:
    """Write what all runs are expected to reach."""
    path = folder / PREDICTIONS
    if path.exists():
        raise SystemExit(f"{path} exists; predictions are made once, before anything is measured")
    near, far = (measure_link(4, delay, waits=0.01) for delay in (0.0, 1e-3))
    rows = []
    for run in runs():
        rate = run.predict(far if run.delay else near).throughput
        rows.append({"name": run.name, "run": asdict(run), "predicted": rate.median, "low": rate.low, "high": rate.high})
    data = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), "rows": rows}
    data |= {"link": near._asdict(), "link through gloo": far._asdict()}
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(rows)} predictions in {path}")


def measure(folder: Path, repeats: int) -> None:
    """Measure what is missing, the file being whole after each run."""
    predictions = json.loads((folder / PREDICTIONS).read_text())
    path = folder / MEASURED
    settings = {"predicted": predictions["made"], "repeats": repeats, "each stage": "stays on one core"}
    record = Record.read(path) if path.exists() else Record("simulated", "mini-batches/s", settings, [])
    done = {row.name for row in record.rows}
    for row in predictions["rows"]:
        if row["name"] in done:
            continue
        samples, loads = [], []
        for _ in range(repeats):
            samples.append(SimulatedRun(**row["run"]).measure())
            loads.append(os.getloadavg()[0])
        own = {**row["run"], "predicted": row["predicted"], "low": row["low"], "high": row["high"], "load": max(loads)}
        record.rows.append(ResultRow(row["name"], samples, own))
        record.write(path)
        print(f"{row['name']}: predicted {row['predicted']:.4g}, measured {samples}", flush=True)


def show(folder: Path) -> None:
    """Errors, relative to what was measured."""
    record = Record.read(folder / MEASURED)
    errors = sorted(abs(row.settings["predicted"] / row.median - 1) for row in record.rows)
    for row in record.rows:
        print(f"{row.settings['predicted'] / row.median - 1:+7.1%}  {row.name}")
    print(f"{len(errors)} runs: median error {median(errors):.1%}, worst {errors[-1]:.1%}")


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
    parser.add_argument("--repeats", type=int, default=2, help="runs of each; the median counts")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where both files are")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        measure(arguments.folder, arguments.repeats)
    else:
        {"predict": predict, "show": show, "scale": scale}[arguments.what](arguments.folder)


if __name__ == "__main__":
    main()
