"""From the death of a process until its stage does new work, where all processes start again from a checkpoint (``--max-restarts``).

python benchmarks/cold_start.py    goes on with results/cold_start.json, which docs/failures.md shows

``pipeoptim faults`` kills one process of a run between two checkpoints, several times. The seconds have all in them that a cold start has:
seeing that it is dead, ending the others, finding a whole checkpoint, starting Python, importing torch, connecting, and the mini-batches
since the checkpoint. Where the user may, the run takes precedence over other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from pipeoptim.bench.record import Record

RESULT = Path(__file__).parent / "results" / "cold_start.json"
KILLS, PERIOD = 4, 20  # of a run; mini-batches between its checkpoints


def take_precedence() -> None:
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def import_seconds() -> float:
    """Of Python with torch, alone."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, preexec_fn=take_precedence)
    return time.monotonic() - began


def cold_starts(stages: int) -> list[float]:
    sentences = [f"kill stage {n % stages} at update {PERIOD * (n + 1) + PERIOD // 2}" for n in range(KILLS)]
    run = ["--recipe", "digits", "--stages", f"{stages}", "--engine", "processes", "--eval-every", "0"]
    run += ["--steps", f"{PERIOD * (KILLS + 2)}", "--checkpoint-every", f"{PERIOD}", "--max-restarts", f"{KILLS}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "pipeoptim", "faults", "--json", "--out", "hit", *sentences, "--", *run],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            check=True,
            preexec_fn=take_precedence,
        )
    return [round(row["seconds"], 3) for row in json.loads(done.stdout)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    given = parser.parse_args()
    record = Record.continued(RESULT, "s", {"mini-batches between checkpoints": PERIOD})
    for _ in range(given.runs):
        measured = {"Python and its import of torch alone": [round(import_seconds(), 3)]}
        measured["D = 2: killed, all restarted from a checkpoint"] = cold_starts(2)
        for name, samples in measured.items():
            record.row_or_new(name).samples.extend(samples)
        record.write(RESULT)
    for row in record.rows:
        print(f"{row.name:60} {row.median:.2f}  of {len(row.samples)}")
