"""SIGTERM and SIGUSR1 at random instants of a run's life: each time it has to save, end in time, and go on to the bits of a run without.

python benchmarks/preemption.py --signals 100     adds to benchmarks/results/preemption.json, which docs/failures.md shows

A run is sent a signal at a random instant, from the start of its command on; the same command goes on with it, and is sent the next one,
until the run is finished and its weights, optimizer states and loss rows are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeoptim.bench.record import Record
from pipeoptim.faults.same_end import last_states, same
from pipeoptim.telemetry.metrics import read_rows

RESULT = Path(__file__).parent / "results" / "preemption.json"
STEPS, EVERY, STEP_SECONDS, LONGEST = 1500, 50, 0.01, 4.0
WHO = {"emulator": ("the process",), "processes": ("the command", "one stage's process", "all processes")}


def net() -> nn.Sequential:
    """Four blocks, with random numbers and statistics of their own."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh()), nn.Dropout(0.1), nn.Linear(16, 16), nn.Linear(16, 3)
    )


class Task:
    """Random inputs; a mini-batch takes some milliseconds."""

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        time.sleep(float(os.environ.get("PREEMPTION_STEP", "0")))
        x = torch.randn(batch_size, 8, generator=torch.Generator().manual_seed(step))
        return x, x[:, :3].argmax(1)

    def validation_batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return [self.train_batch(10**6, batch_size)]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return "random numbers"


def start(folder: Path, name: str, engine: str, step_seconds: float) -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve()
    options = [f"--model={here}:net", f"--data={here}:Task", "--optimizer", "adamw", "--lr", "0.01", "--out", str(folder)]
    options += ["--name", name, "--stages", "2", "--engine", engine, "--steps", str(STEPS), "--checkpoint-every", str(EVERY)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREEMPTION_STEP": str(step_seconds)}
    with (folder / f"{name}.log").open("ab") as log:
        command = [sys.executable, "-m", "pipeoptim", "train", *options, "--eval-every", "170", "--quiet"]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def disturbed(folder: Path, name: str, engine: str, random_instants: random.Random) -> list[tuple[str, float]]:
    """Send signals until the run is finished: whom each was sent to, and seconds until the command had ended."""
    found: list[tuple[str, float]] = []
    while True:
        command = start(folder, name, engine, STEP_SECONDS)
        number = random_instants.choice((signal.SIGTERM, signal.SIGUSR1))
        who = random_instants.choice(WHO[engine])
        try:
            # Half of the signals come while the command starts, which takes long on a busy machine; the others while it trains.
            if random_instants.random() < 0.5:
                wait_for_training(command, folder / name)
            if command.wait(random_instants.uniform(0, LONGEST)) == 0:
                return found
            raise AssertionError(f"ended by itself with {command.returncode}; log: {folder / name}.log")
        except subprocess.TimeoutExpired:
            pass
        told, began = send(folder / name, command, number, who, random_instants), time.monotonic()
        code = command.wait(120)
        if code == 0:
            return found
        # A negative code: Python had not come to the command yet.
        assert code in (128 + number, -number), f"ended with {code} after {number.name} to {told}; log: {folder / name}.log"
        found.append((f"{engine}, {told}", time.monotonic() - began))


def wait_for_training(command: subprocess.Popen[bytes], run: Path) -> None:
    """Until the command writes rows of mini-batches."""
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while command.poll() is None and not (metrics.exists() and metrics.stat().st_mtime_ns > before):
        time.sleep(0.05)


def send(run: Path, command: subprocess.Popen[bytes], number: int, who: str, instants: random.Random) -> str:
    """Send the signal; returns to whom, the command where its workers have not begun."""
    launches = sorted(run.glob("logs/launch-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    logs = sorted(launches[-1].glob("stage-*.err")) if launches and who not in ("the command", "the process") else []
    pids = [int(pid) for log in logs for pid in re.findall(r"^rank \d+: process (\d+)$", log.read_text(), re.MULTILINE)]
    pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    targets = {"one stage's process": pids and [instants.choice(pids)], "all processes": [command.pid, *pids]}.get(who)
    for pid in targets or [command.pid]:
        os.kill(pid, number)
    return who if pids or who == "the process" else "the command"


def equal(one: Path, other: Path) -> bool:
    """Whether two runs have ended alike: all that their last checkpoints hold, and the losses of all steps."""
    rows = [[(row["step"], row["loss"]) for row in read_rows(run / "metrics.jsonl") if "loss" in row] for run in (one, other)]
    return same(last_states(one), last_states(other)) and rows[0] == rows[1] and len(rows[0]) == STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=100, help="in all, those of the result file included")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    settings = {"stages": 2, "steps": STEPS, "steps between checkpoints": EVERY, "signals": 0, "saved and resumed bit-equal": 0}
    record = Record.read(given.result) if given.result.exists() else Record("preemption", "seconds to the end", settings, [])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        assert start(folder, "whole", "emulator", 0).wait() == 0, (folder / "whole.log").read_text()
        while record.settings["signals"] < given.signals:
            seed = record.settings["signals"]
            engine = "emulator" if seed % 3 == 0 else "processes"
            found = disturbed(folder, f"run-{seed}", engine, random.Random(seed))
            alike = equal(folder / "whole", folder / f"run-{seed}")
            record.settings["signals"] += len(found)
            record.settings["saved and resumed bit-equal"] += len(found) * alike
            for name, seconds in found:
                record.row_or_new(name).samples.append(round(seconds, 2))
            record.write(given.result)
            print(
                f"{engine}: {len(found)} signals, {'equal' if alike else 'NOT EQUAL'}; {record.settings['signals']} in all",
                flush=True,
            )


if __name__ == "__main__":
    main()
