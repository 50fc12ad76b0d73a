"""Compare methods in runs of 1,500 updates after warm-up, each at its own best learning rate, three seeds, several optimizers.

    python benchmarks/learning.py [--jobs 2] [--only 8x8/adamw,8x1] [--work runs/learning] [--list]

A *setting* is a task, a depth D and a number of micro-batches M; in each setting every method has the learning rate with the lowest
final validation loss at seed 0 among those of the optimizer's grid, and then the other seeds at that rate. Every run is a folder under
--work, and a run that has ended is not repeated, so that the whole grid can be stopped and continued at will; after every
run benchmarks/results/learning.json is written from what is there. Its tables are in docs/results.md (benchmarks/render_results.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeoptim.bench.record import machine
from pipeoptim.compare.outcome import is_done, read_run
from pipeoptim.compare.statistics import Spread, tail_mean
from pipeoptim.compare.worker import OUTCOME, carry_out
from pipeoptim.config import Component, TrainConfig

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "learning.json"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Contender:
    """A method with its options: one line of a table.

    Args:
        name: as tables show it.
        method: as ``pipeoptim train --method`` takes it.
        fields: of the run's configuration, where they are not those of the setting.
        optimizer: options of the optimizer that belong to this contender, by the optimizer's name.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)


IN_PROGRESS = {"prediction": "in_progress"}

SYNCHRONOUS = Contender("1f1b", "1f1b")
CONTENDERS = (
    SYNCHRONOUS,
    Contender("naive", "naive"),
    Contender("pipeoptim, in progress", "pipeoptim", IN_PROGRESS),
    Contender("pipedream", "pipedream"),
    Contender("pipeoptim", "pipeoptim", {"prediction": "refined"}),
    Contender("pipeoptim_stash, in progress", "pipeoptim_stash", IN_PROGRESS),
    Contender("pipedream_2bw", "pipedream_2bw"),
    Contender("spectrain", "spectrain"),
    Contender("xpipe", "xpipe"),
    Contender("pipemare", "pipemare(anneal_updates=400)"),
    Contender("nesterov", "nesterov"),
)
CORE = ("1f1b", "naive", "pipedream", "pipeoptim, in progress", "pipeoptim")


@dataclass(frozen=True)
class OptimizerGrid:
    """An optimizer and the learning rates that every method is tried with."""

    component: Component
    rates: tuple[float, ...]


OPTIMIZERS = {
    "adamw": OptimizerGrid(Component("adamw", {"weight_decay": 0.01}), (1e-3, 3e-3, 6e-3)),
    "muon": OptimizerGrid(Component("muon_adamw", {"weight_decay": 0.01}), (1e-3, 3e-3, 6e-3)),
    "rotated": OptimizerGrid(Component("rotated_adam", {"weight_decay": 0.01}), (1e-3, 3e-3, 6e-3)),
    "sgd": OptimizerGrid(Component("sgd", {"momentum": 0.9}), (0.03, 0.1, 0.3)),
    "rmsprop": OptimizerGrid(Component("rmsprop", {"alpha": 0.99}), (5e-4, 1e-3, 2e-3)),
}


def chars(depth: int, microbatches: int) -> TrainConfig:
    """The source of Python's standard library, character by character: a GPT of width 64 with one block per stage, context 64,
    16 sequences per mini-batch (or one per micro-batch, if that is more), clipped per stage at norm 1.
    """
    return TrainConfig(
        recipe="chars",
        model=Component(
            "pipeoptim_zoo.models.gpt:gpt",
            {"vocab_size": 98, "context": 64, "width": 64, "layers": depth, "heads": 4, "dropout": 0.0},
        ),
        data=Component("pipeoptim_zoo.data.stdlib_text:chars", {"context": 64}),
        optimizer=Component("adamw"),
        lr_schedule=Component("cosine", {"warmup": 100, "final": 0.1}),
        stages=depth,
        microbatches=microbatches,
        batch_size=max(16, microbatches),
        steps=1600,
        eval_every=100,
        eval_batches=32,
        checkpoint_every=0,
        clip=1.0,
        clip_scope="stage",
    )


TASKS = {"chars": chars}


@dataclass(frozen=True)
class Setting:
    """What all contenders of one table share."""

    task: str
    depth: int
    microbatches: int
    optimizer: str
    contenders: tuple[str, ...] = tuple(contender.name for contender in CONTENDERS)

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"{self.task}/{self.depth}x{self.microbatches}/{self.optimizer}"

    def config(self, contender: Contender, rate: float, seed: int) -> TrainConfig:
        """The run of one contender."""
        component = OPTIMIZERS[self.optimizer].component.with_options(lr=rate, **contender.optimizer.get(self.optimizer, {}))
        base = TASKS[self.task](self.depth, self.microbatches)
        return replace(base, method=contender.method, seed=seed, optimizer=component, **contender.fields)


#: In the order in which they are trained: what is wanted most comes first.
SETTINGS = (
    Setting("chars", 8, 8, "adamw"),
    Setting("chars", 8, 8, "muon", CORE),
    Setting("chars", 8, 8, "sgd", CORE),
    Setting("chars", 8, 8, "rotated", CORE),
    Setting("chars", 8, 1, "adamw", CORE),
    Setting("chars", 8, 1, "rotated", CORE),
    Setting("chars", 8, 16, "adamw", CORE),
    Setting("chars", 16, 16, "adamw", CORE),
    Setting("chars", 32, 32, "adamw", CORE),
    Setting("chars", 4, 4, "adamw", CORE),
    Setting("chars", 8, 8, "rmsprop", CORE),
)


@dataclass(frozen=True)
class Run:
    """One training run of the grid."""

    setting: Setting
    contender: Contender
    rate: float
    seed: int

    def folder(self, work: Path) -> Path:
        name = self.contender.name.replace(", ", "-").replace(" ", "_")
        return work / self.setting.name / name / f"lr-{self.rate:g}-seed-{self.seed}"


def loss_of(run: Run, work: Path) -> float | None:
    """Final validation loss; None where the run has not ended, or has diverged."""
    folder = run.folder(work)
    if not is_done(folder) or json.loads((folder / OUTCOME).read_text())["status"] != "finished":
        return None
    outcome = read_run(run.setting.config(run.contender, run.rate, run.seed), folder)
    return outcome.val_loss


def best_rate(setting: Setting, contender: Contender, work: Path) -> float | None:
    """The learning rate with the lowest loss at the first seed; None as long as one of the grid is missing, or if all diverged."""
    rates = OPTIMIZERS[setting.optimizer].rates
    runs = [Run(setting, contender, rate, SEEDS[0]) for rate in rates]
    if not all(is_done(run.folder(work)) for run in runs):
        return None
    losses = [(loss, run.rate) for run in runs if (loss := loss_of(run, work)) is not None]
    return min(losses)[1] if losses else None


def missing_runs(settings: Sequence[Setting], work: Path) -> Iterator[Run]:
    """The runs to do next: first the grids at seed 0, then, contender by contender, the other seeds."""
    for setting in settings:
        for contender in (c for c in CONTENDERS if c.name in setting.contenders):
            best = best_rate(setting, contender, work)
            grid = [Run(setting, contender, rate, SEEDS[0]) for rate in OPTIMIZERS[setting.optimizer].rates]
            seeds = [Run(setting, contender, best, seed) for seed in SEEDS[1:]] if best is not None else []
            yield from (run for run in (*grid, *seeds) if not is_done(run.folder(work)))


def carry_out_run(run: Run, work: Path) -> str:
    """Train it, unless somebody else is at it or was; returns a line for the terminal."""
    folder, began = run.folder(work), time.monotonic()
    outcome = carry_out(run.setting.config(run.contender, run.rate, run.seed), folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTCOME).write_text(json.dumps(outcome) + "\n")
    loss = loss_of(run, work)
    figure = f"{loss:.4f}" if loss is not None else f"{outcome['status']}: {outcome.get('reason', '')}"
    return (
        f"{time.monotonic() - began:5.0f} s  {run.setting.name} {run.contender.name} lr {run.rate:g} seed {run.seed}: {figure}"
    )


def train_all(settings: Sequence[Setting], work: Path, jobs: int, result: Path) -> None:
    """All that is missing, `jobs` at a time."""
    began: set[Path] = set()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        running: list[Any] = []
        while True:
            running, ended = [r for r in running if not r.ready()], [r for r in running if r.ready()]
            for done in ended:
                print(done.get(), flush=True)
            if ended:
                write(work, result)
            following = (run for run in missing_runs(settings, work) if run.folder(work) not in began)
            while len(running) < jobs and (run := next(following, None)) is not None:
                began.add(run.folder(work))
                running.append(pool.apply_async(carry_out_run, (run, work)))
            if not running:
                return
            running[0].wait(1.0)


def line(setting: Setting, contender: Contender, work: Path) -> dict[str, Any] | None:
    """What a table shows of one contender; None as long as its grid is not done."""
    rate = best_rate(setting, contender, work)
    if rate is None:
        return None
    runs = [run for seed in SEEDS if is_done((run := Run(setting, contender, rate, seed)).folder(work))]
    losses = [loss_of(run, work) for run in runs]
    spread = Spread.of(losses)
    outcomes = [read_run(run.setting.config(run.contender, run.rate, run.seed), run.folder(work)) for run in runs]
    grid = {f"{r:g}": loss_of(Run(setting, contender, r, SEEDS[0]), work) for r in OPTIMIZERS[setting.optimizer].rates}
    return {
        "contender": contender.name,
        "method": contender.method,
        "fields": contender.fields,
        "lr": rate,
        "lr_tried": grid,
        "losses": losses,
        "val_loss": None if spread is None else {"mean": spread.mean, "deviation": spread.deviation},
        "train_loss": [tail_mean(outcome.train.values) for outcome in outcomes],
        "weight_copies": outcomes[0].weight_copies,
        "weight_bytes": outcomes[0].weight_bytes,
        "curves": [[list(o.validation.steps), [float(f"{v:.5g}") for v in o.validation.values]] for o in outcomes],
    }


def write(work: Path, result: Path) -> None:
    """The result file, from all runs that are there."""
    tables = []
    for setting in SETTINGS:
        lines = [entry for c in CONTENDERS if c.name in setting.contenders and (entry := line(setting, c, work))]
        if lines:
            base = TASKS[setting.task](setting.depth, setting.microbatches)
            tables.append(
                {
                    "name": setting.name,
                    "task": setting.task,
                    "stages": setting.depth,
                    "microbatches": setting.microbatches,
                    "optimizer": setting.optimizer,
                    "steps": base.steps,
                    "batch_size": base.batch_size,
                    "lines": lines,
                }
            )
    about = {name: " ".join((make.__doc__ or "").split()) for name, make in TASKS.items()}
    data = {"about": about, "seeds": len(SEEDS), "machine": machine(), "tables": tables}
    part = result.with_suffix(".json.part")
    part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    part.replace(result)


def chosen_settings(only: str) -> list[Setting]:
    """Those whose name contains one of the parts; all for none."""
    parts = [part for part in only.split(",") if part]
    chosen = [setting for setting in SETTINGS if not parts or any(part in setting.name for part in parts)]
    if not chosen:
        sys.exit(f"--only {only} matches no setting; there are {', '.join(setting.name for setting in SETTINGS)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", default="", help="parts of names of settings, with commas between them")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "learning", help="folder of the runs")
    parser.add_argument("--result", type=Path, default=RESULT, help="result file")
    parser.add_argument("--list", action="store_true", help="say which runs are missing, and train nothing")
    options = parser.parse_args()
    settings = chosen_settings(options.only)
    if options.list:
        for run in missing_runs(settings, options.work):
            print(run.folder(options.work))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    train_all(settings, options.work, options.jobs, options.result)
    write(options.work, options.result)


if __name__ == "__main__":
    main()
