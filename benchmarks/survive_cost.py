"""What ``--survive 16`` costs while nothing dies, in time and in memory.

python benchmarks/survive_cost.py    goes on with results/survive_cost.json and results/survive_memory.json, which docs/failures.md shows

Two runs that differ in the option only train at the same time, in turns of 48 mini-batches, so that other work on the machine hits both:

    without      |--- 48 ---|            |--- 48 ---|            the gate is a callback: stage 0 waits for a file that says go
    survive 16               |- i  i  i -|           |- i ...    three images per turn, none at its ends

Two kinds of runs: emulated devices, of which B takes twice as long as F, whatever else the machine does; and real computation.
Afterwards, memory is sampled: the proportional set sizes (PSS) of the processes and of their sleeping images, which share pages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeoptim.bench.record import Record
from pipeoptim.config import Component, TrainConfig
from pipeoptim.train.callbacks import Callback, RunView

RESULTS = Path(__file__).parent / "results"
EVERY, TURN, OFFSET = 16, 48, 8  # mini-batches: between images; of a turn; between the end of a turn and an image
SAMPLED, LOOK = 1, 0.01  # turns in which memory is sampled, at the end; seconds between looks
KINDS: dict[str, dict[str, Any]] = {
    "emulated devices, mini-batches of 30 ms, D = 2": {"stages": 2, "width": 256, "layers": 4, "batch": 32, "ms": 10},
    "emulated devices, mini-batches of 90 ms, D = 2": {"stages": 2, "width": 256, "layers": 4, "batch": 32, "ms": 30},
    "emulated devices, mini-batches of 30 ms, D = 4 on 2 cores": {
        "stages": 4,
        "width": 256,
        "layers": 4,
        "batch": 32,
        "ms": 10,
    },
    "computation, messages of 1.5 MiB, D = 2": {"stages": 2, "width": 512, "layers": 4, "batch": 768, "ms": 0},
}
OPTIONS = {"without": [], f"survive {EVERY}": ["--survive", str(EVERY)]}


class Device(torch.autograd.Function):
    """The identity, on a device that takes so many seconds for it, and twice as many for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return gradient, None


class Block(nn.Sequential):
    """All layers of a stage."""

    def __init__(self, width: int, layers: int, seconds: float) -> None:
        super().__init__(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return Device.apply(out, self.seconds) if self.seconds else out  # type: ignore[no-any-return]


def model(stages: int, width: int, layers: int, ms: float) -> nn.Sequential:
    return nn.Sequential(*(Block(width, layers, ms / 1000) for _ in range(stages)))


class Noise:
    """The same random numbers in every mini-batch."""

    def __init__(self, width: int, batch: int) -> None:
        self.x = torch.randn(batch, width, generator=torch.Generator().manual_seed(0))

    def train_batch(self, step: int, batch_size: int) -> tuple[Tensor, Tensor]:
        return self.x, self.x

    def validation_batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        return [(self.x, self.x)]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return "random numbers"


class Gate(Callback):
    """Lets a turn pass when the file ``go-N`` says so, and writes down when each stage began and ended it."""

    def on_update(self, run: RunView, k: int, version: int) -> None:
        turn, place = divmod(version - OFFSET, TURN)
        if place == 0:
            self._note(run, f"end-{turn}-{k}")
            while k == 0 and not Path(f"go-{turn}").exists():
                time.sleep(LOOK)
        if place == 1:
            self._note(run, f"begin-{turn}-{k}")

    def _note(self, run: RunView, name: str) -> None:
        used = os.times()
        part = Path(f".{name}")
        part.write_text(f"{time.monotonic()} {used.user + used.system}")
        part.replace(name)


def recipe(kind: str, turns: int) -> TrainConfig:
    shape = KINDS[kind]
    made = {name: shape[name] for name in ("stages", "width", "layers", "ms")}
    return TrainConfig(
        recipe="survive_cost",
        model=Component("survive_cost:model", made),
        data=Component("survive_cost:Noise", {"width": shape["width"], "batch": shape["batch"]}),
        optimizer=Component("adamw", {"lr": 1e-5}),
        stages=shape["stages"],
        batch_size=shape["batch"],
        steps=turns * TURN + OFFSET + 4,
        engine="processes",
        callbacks="survive_cost:Gate",
        eval_every=0,
        checkpoint_every=0,
    )


class GatedRun:
    """A run of ``kind`` in ``folder``, which must not exist."""

    def __init__(self, folder: Path, kind: str, options: list[str], turns: int) -> None:
        folder.mkdir()
        self.folder, self.stages = folder, KINDS[kind]["stages"]
        (folder / "run.json").write_text(recipe(kind, turns).to_json())
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "pipeoptim", "train", "--quiet", "--name", "run", "--config", "run.json", *options]
        self._errors = (folder / "errors").open("w+")
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        self.command = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=self._errors)

    def let_go(self, turn: int) -> None:
        (self.folder / f"go-{turn}").touch()

    def has(self, name: str) -> bool:
        """Whether the run has written ``name``. Raises RuntimeError where it has ended instead."""
        if self.command.poll():
            raise RuntimeError((self.folder / "errors").read_text()[-3000:])
        return (self.folder / name).exists()

    def wait_for(self, turn: int) -> None:
        """Until all stages have ended it."""
        while not all(self.has(f"end-{turn}-{k}") for k in range(self.stages)):
            time.sleep(LOOK)

    def seconds(self, turn: int) -> tuple[float, float]:
        """Of turn ``turn``: by the clock of stage 0, and of processors, of all stages."""
        passed = []
        for k in range(self.stages):
            names = f"begin-{turn}-{k}", f"end-{turn + 1}-{k}"
            (began, before), (ended, after) = (map(float, (self.folder / name).read_text().split()) for name in names)
            passed.append((ended - began, after - before))
        return passed[0][0], sum(used for _, used in passed)

    def processes(self) -> list[Path]:
        """In /proc, all that work in the run's folder: the command, the stages, their images."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "cwd").resolve() == self.folder.resolve():
                    found.append(process)
        return found

    def take_precedence(self) -> bool:
        """Of other work on the machine, once it has begun; images inherit it. Returns whether this user may."""
        for thread in [task for process in self.processes() for task in (process / "task").iterdir()]:
            try:
                os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
            except PermissionError:
                return False
            except ProcessLookupError:
                continue
        return True

    def memory(self) -> float:
        """MiB of all its processes and images, pages that several have counted by halves, thirds and so on; per stage."""
        total = 0
        for process in self.processes():
            with suppress(OSError, StopIteration):
                if int(process.name) != self.command.pid:
                    lines = (process / "smaps_rollup").read_text().splitlines()
                    total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
        return total / 1024 / self.stages

    def end(self) -> None:
        if self.command.poll() is None:
            self.command.terminate()
        self.command.wait()
        self._errors.close()


def measure(kind: str, turns: int, folder: Path) -> tuple[list[float], list[float], dict[str, float]]:
    """Time and processor time with images over those without, of each pair of turns; and the most memory of each run."""
    last = 1 + turns + SAMPLED  # turn 0 warms up
    runs = {name: GatedRun(folder / name.replace(" ", "-"), kind, options, last) for name, options in OPTIONS.items()}
    most = dict.fromkeys(runs, 0.0)
    try:
        for run in runs.values():
            run.wait_for(0)
        # Processes that never rest would let nothing else run, this one neither.
        first = KINDS[kind]["ms"] > 0 and all(run.take_precedence() for run in runs.values())
        print(f"{kind}: {'before' if first else 'beside'} other work on the machine", flush=True)
        for turn in range(last):
            for name, run in [*runs.items()][:: 1 if turn % 2 else -1]:
                run.wait_for(turn)
                run.let_go(turn)
                while turn > turns and not run.has(f"end-{turn + 1}-0"):
                    most[name] = max(most[name], run.memory())
                    time.sleep(LOOK)
                run.wait_for(turn + 1)
        clock, used = zip(
            *(
                [mine / base for base, mine in zip(*(run.seconds(turn) for run in runs.values()), strict=True)]
                for turn in range(1, turns + 1)
            ),
            strict=True,
        )
    finally:
        for run in runs.values():
            run.end()
    return list(clock), list(used), most


def add(record: Record, name: str, samples: list[float]) -> None:
    record.row_or_new(name).samples.extend(round(sample, 4) for sample in samples)
    record.write(RESULTS / f"{record.benchmark}.json")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12, help="pairs of turns, of each kind")
    parser.add_argument("--only", default="", help="the kind whose name begins so")
    given = parser.parse_args()
    cost = Record.continued(
        RESULTS / "survive_cost.json", "time without", {"survive": EVERY, "mini-batches per sample": TURN - 1}
    )
    memory = Record.continued(RESULTS / "survive_memory.json", "MiB per stage", {"survive": EVERY})
    for kind in KINDS:
        if kind.startswith(given.only):
            with tempfile.TemporaryDirectory() as folder:
                clock, used, most = measure(kind, given.turns, Path(folder))
            # Of emulated devices, which hardly compute, the clock says it; where all cores compute beside other work, it says little.
            add(cost, *((kind, clock) if KINDS[kind]["ms"] else (f"{kind}: processor time", used)))
            for name, mebibytes in most.items():
                add(memory, f"{kind}: {name}", [mebibytes])
    for row in [*cost.rows, *memory.rows]:
        print(f"{row.name:60} {row.median:.3f}  of {len(row.samples)}")
