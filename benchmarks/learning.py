"""Compare methods in runs of 1,500 updates after warm-up, each at its own best learning rate, three seeds, several optimizers.

    python benchmarks/learning.py [--jobs 2] [--only 8x8/adamw,8x1] [--list]

A *setting* is a task, a depth D, a number of micro-batches M and an optimizer. In each, every contender (a method with its options)
looks for its learning rate at seed 0: from the middle of the optimizer's rates upwards, then downwards, as long as the final
validation loss falls. The other seeds follow at the best one and at those within 1 % of it, and the lowest mean counts. Everything is in
benchmarks/results/learning.json, which is written after every run: what is in it is not run again, so that the grid can be stopped and
continued at will, also on another machine. Delete a run there to repeat it. Its tables are in docs/results.md (`python
benchmarks/render.py`).

Without staleness the number of micro-batches changes rounding only. So synchronous training is run once per depth and mini-batch, at M = 1.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from compare_all import Choice

from pipeoptim.compare.outcome import read_run
from pipeoptim.compare.worker import OUTCOME, carry_out
from pipeoptim.config import Component, TrainConfig
from pipeoptim.telemetry.metrics import tail_mean
from pipeoptim.train.machine import machine
from pipeoptim_zoo.data.unicode_names import SOURCE_LENGTH, TARGET_LENGTH

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "learning.json"
SEEDS = (0, 1, 2)
#: A rate whose loss at seed 0 is at most so many times the lowest may be the better one: all seeds decide.
CLOSE = 1.01


@dataclass(frozen=True)
class Contender:
    """A method with its options: one line of a table.

    Args:
        name: as tables show it.
        method: as ``pipeoptim train --method`` takes it.
        fields: of the run's configuration, where they are not those of the setting.
    """

    name: str
    method: str
    fields: dict[str, Any] = field(default_factory=dict)


IN_PROGRESS = {"prediction": "in_progress"}
REFINED = {"prediction": "refined"}
#: Of 0.5, 0.75 and 1 at one seed of chars, M = 1, rotated Adam.
BY_GAP = {"rate_by_gap": 0.75}

SYNCHRONOUS = Contender("1f1b", "1f1b")
CONTENDERS = {
    contender.name: contender
    for contender in (
        SYNCHRONOUS,
        Contender("naive", "naive"),
        Contender("pipedream", "pipedream"),
        Contender("pipeoptim, in progress", "pipeoptim", IN_PROGRESS),
        Contender("pipeoptim, refined", "pipeoptim", REFINED),
        Contender("pipeoptim_stash, in progress", "pipeoptim_stash", IN_PROGRESS),
        Contender("pipeoptim_stash, refined", "pipeoptim_stash", REFINED),
        Contender("pipedream_2bw", "pipedream_2bw"),
        Contender("spectrain", "spectrain"),
        Contender("xpipe", "xpipe"),
        Contender("pipemare", "pipemare(anneal_updates=400)"),
        Contender("nesterov", "nesterov"),
        Contender("pipeoptim, in progress, 160 synchronous", "pipeoptim", {**IN_PROGRESS, "synchronous_updates": 160}),
        Contender("pipeoptim, in progress, slack 1", "pipeoptim", {**IN_PROGRESS, "slack": "1"}),
        Contender("pipeoptim, refined, 160 synchronous", "pipeoptim", {**REFINED, "synchronous_updates": 160}),
        Contender("pipeoptim, refined, rates by gap", "pipeoptim", {**REFINED, **BY_GAP}),
        Contender("pipedream, rates by gap", "pipedream", BY_GAP),
        Contender("naive, rates by gap", "naive", BY_GAP),
    )
}
#: What synchronous training reaches in a part of the updates, each run with its own learning rate schedule to its end: the first is what
#: 1F1B with a flush does at D = M = 8 while an asynchronous pipeline does all of them (8 of 15 slots are busy).
SHORTER = {f"1f1b, {steps} updates": steps for steps in (853, 1067, 1280)}
CONTENDERS |= {name: Contender(name, "1f1b", {"steps": steps}) for name, steps in SHORTER.items()}

#: The least that answers "how much of the gap is closed".
CORE = ("1f1b", "naive", "pipedream", "pipeoptim, in progress")
#: The first tenth of the updates synchronous, which takes time as a flush does; and twice as many micro-batches in flight.
EARLY, LATE = "pipeoptim, in progress, 160 synchronous", "pipeoptim, in progress, slack 1"
RIVALS = ("pipedream_2bw", "nesterov", "spectrain", "xpipe", "pipemare", "pipeoptim, refined", "pipeoptim_stash, in progress")
#: At M = 1 there is no mini-batch in progress.
DELAYED = ("pipeoptim, refined, rates by gap", "pipedream, rates by gap", "naive, rates by gap")
CORE_1 = ("1f1b", "naive", "pipedream", "pipeoptim, refined", "pipeoptim, refined, 160 synchronous", *DELAYED)


#: The rates rise, and every contender looks for its own among them, beginning in the middle.
OPTIMIZERS = {
    "adamw": Choice(Component("adamw", {"weight_decay": 0.01}), (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "muon": Choice(Component("muon_adamw", {"weight_decay": 0.01}), (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)),
    "rotated": Choice(Component("rotated_adam", {"weight_decay": 0.01}), (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)),
    "rotated_95": Choice(
        Component("rotated_adam", {"weight_decay": 0.01, "betas": (0.95, 0.999)}), (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
    ),
    "sgd": Choice(Component("sgd", {"momentum": 0.9}), (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)),
    "rmsprop": Choice(Component("rmsprop", {"alpha": 0.99}), (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)),
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


def names(depth: int, microbatches: int) -> TrainConfig:
    """Translation of what Unicode says of a character into its name, letter by letter, by the same GPT, which reads both in one line;
    16 pairs per mini-batch (or one per micro-batch), label smoothing 0.1, clipped per stage at norm 1.
    """
    config = chars(depth, microbatches)
    length = SOURCE_LENGTH + TARGET_LENGTH
    return replace(
        config,
        recipe="names",
        model=config.model.with_options(vocab_size=63, context=length),
        data=Component("pipeoptim_zoo.data.unicode_names:unicode_names", {"one_line": True}),
    )


TASKS = {"chars": chars, "names": names}


@dataclass(frozen=True)
class Setting:
    """What all contenders of one table share."""

    task: str
    depth: int
    microbatches: int
    optimizer: str
    contenders: tuple[str, ...]

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"{self.task}/{self.depth}x{self.microbatches}/{self.optimizer}"

    def config(self, contender: Contender, rate: float, seed: int) -> TrainConfig:
        """The run of one contender."""
        component = OPTIMIZERS[self.optimizer].component.with_options(lr=rate)
        base = TASKS[self.task](self.depth, self.microbatches)
        microbatches = 1 if contender.method == SYNCHRONOUS.method else self.microbatches
        return replace(
            base, method=contender.method, seed=seed, optimizer=component, microbatches=microbatches, **contender.fields
        )


#: In the order in which they are trained: what is wanted most comes first.
SETTINGS = (
    Setting("chars", 8, 8, "adamw", (*CORE, *SHORTER, EARLY)),
    Setting("chars", 8, 1, "rotated", CORE_1),
    Setting("chars", 8, 8, "rotated", CORE),
    Setting("chars", 8, 8, "muon", CORE),
    Setting("chars", 8, 16, "adamw", (*CORE, EARLY, LATE)),
    Setting("chars", 8, 8, "adamw", (*CORE, LATE)),
    Setting("chars", 8, 8, "sgd", (*CORE, EARLY)),
    Setting("names", 8, 8, "adamw", CORE),
    Setting("chars", 8, 1, "adamw", CORE_1),
    Setting("chars", 8, 1, "rotated_95", CORE_1),
    Setting("chars", 32, 32, "adamw", CORE),
    Setting("chars", 8, 8, "adamw", (*CORE, *SHORTER, *RIVALS)),
    Setting("chars", 16, 16, "adamw", CORE),
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

    @property
    def config(self) -> TrainConfig:
        return self.setting.config(self.contender, self.rate, self.seed)

    @property
    def key(self) -> str:
        """By which the result file knows it."""
        config = self.config
        what = f"{self.setting.task}/{config.stages}x{config.microbatches}/batch {config.batch_size}/{self.setting.optimizer}"
        return f"{what}/{self.contender.name}/lr {self.rate:g}/seed {self.seed}"


class Ledger:
    """The result file: what every run gave, by its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, dict[str, Any]] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def loss(self, run: Run) -> float | None:
        """Final validation loss; None if the run has diverged. KeyError if it has not ended."""
        loss: float | None = self.runs[run.key]["val_loss"]
        return loss

    def add(self, run: Run, figures: dict[str, Any]) -> None:
        """Keep it, and write the file, one line per run."""
        self.runs[run.key] = figures
        about = {name: " ".join((make.__doc__ or "").split()) for name, make in TASKS.items()}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(self.runs[key], allow_nan=False)}" for key in sorted(self.runs))
        head = f' "about": {json.dumps(about)},\n "machine": {json.dumps(machine())},\n "runs": {{\n'
        part = self.path.with_suffix(".json.part")
        part.write_text("{\n" + head + lines + "\n }\n}\n")
        part.replace(self.path)

    def climb(self, setting: Setting, contender: Contender) -> tuple[Run | None, Run | None]:
        """The next run of the search for the learning rate, or (None, the best of them); (None, None) if all have diverged."""
        rates = OPTIMIZERS[setting.optimizer].rates
        runs = [Run(setting, contender, rate, SEEDS[0]) for rate in rates]
        best = len(rates) // 2
        for step in (1, -1):
            at = best
            while 0 <= at < len(runs):
                if runs[at].key not in self.runs:
                    return runs[at], None
                if _worse(self.loss(runs[at]), self.loss(runs[best])):
                    break
                best = at
                at += step
        return None, None if self.loss(runs[best]) is None else runs[best]

    def close(self, best: Run) -> list[Run]:
        """The runs at seed 0 whose rates may be the best one, as far as that seed tells; ``best`` is the first."""
        lowest = self.loss(best)
        assert lowest is not None
        others = [replace(best, rate=rate) for rate in OPTIMIZERS[best.setting.optimizer].rates if rate != best.rate]
        known = ((run, self.loss(run)) for run in others if run.key in self.runs)
        return [best, *(run for run, loss in known if loss is not None and loss <= CLOSE * lowest)]

    def best(self, setting: Setting, contender: Contender) -> Run | None:
        """At the best rate: of those that were close at seed 0 and have all seeds, the one with the lowest mean."""
        _, best = self.climb(setting, contender)
        if best is None:
            return None
        sums = []
        for run in self.close(best):
            seeds = [replace(run, seed=seed) for seed in SEEDS]
            if all(one.key in self.runs for one in seeds):
                losses = [self.loss(one) for one in seeds]
                sums.append((sum(math.inf if loss is None else loss for loss in losses), run))
        return min(sums, key=itemgetter(0))[1] if sums and sums[0][1] is best else best

    def missing(self, settings: Sequence[Setting]) -> Iterator[Run]:
        """The runs that can begin now: of every contender the next one of its search, and the other seeds once that has ended."""
        for setting in settings:
            for contender in (CONTENDERS[name] for name in setting.contenders):
                run, best = self.climb(setting, contender)
                rates = [] if best is None else self.close(best)
                others = [replace(one, seed=seed) for one in rates for seed in SEEDS[1:]]
                yield from (r for r in ([run] if run else others) if r.key not in self.runs)


def _worse(loss: float | None, than: float | None) -> bool:
    """Of two final losses; a run that diverged (None) is worse than any, and no better than another that did."""
    return than is not None and (loss is None or loss > than)


def carry_out_run(run: Run) -> tuple[Run, dict[str, Any], float]:
    """Train it in a folder that is gone afterwards; returns its figures and the seconds it took."""
    began, config = time.monotonic(), run.config
    with tempfile.TemporaryDirectory(prefix="learning-") as work:
        folder = Path(work) / "run"
        ended = carry_out(config, folder)
        (folder / OUTCOME).write_text(json.dumps(ended) + "\n")
        if ended["status"] not in ("finished", "diverged"):
            raise RuntimeError(f"{run.key}: {ended['status']}: {ended.get('reason')}")
        outcome = read_run(config, folder)
    curve = [
        [step, float(f"{value:.5g}")] for step, value in zip(outcome.validation.steps, outcome.validation.values, strict=True)
    ]
    figures = {
        "val_loss": outcome.val_loss,
        "train_loss": tail_mean(outcome.train.values) if outcome.finished else None,
        "weight_copies": outcome.weight_copies,
        "weight_bytes": outcome.weight_bytes,
        "curve": curve,
        "version": outcome.versions.get("pipeoptim"),
    }
    return run, figures, time.monotonic() - began


def train_all(settings: Sequence[Setting], jobs: int, ledger: Ledger) -> None:
    """All that is missing, `jobs` at a time."""
    began: set[str] = set()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=8) as pool:
        running: list[Any] = []
        while True:
            ended, running = [r for r in running if r.ready()], [r for r in running if not r.ready()]
            for done in ended:
                run, figures, seconds = done.get()
                ledger.add(run, figures)
                print(f"{seconds:5.0f} s  {run.key}: {figures['val_loss'] or 'diverged'}", flush=True)
            following = (run for run in ledger.missing(settings) if run.key not in began)
            while len(running) < jobs and (following_run := next(following, None)) is not None:
                began.add(following_run.key)
                running.append(pool.apply_async(carry_out_run, (following_run,)))
            if not running:
                return
            running[0].wait(1.0)


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
    parser.add_argument("--result", type=Path, default=RESULT, help="result file")
    parser.add_argument("--list", action="store_true", help="say which runs could begin now, and train nothing")
    options = parser.parse_args()
    settings, ledger = chosen_settings(options.only), Ledger(options.result)
    if options.list:
        for run in ledger.missing(settings):
            print(run.key)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    train_all(settings, options.jobs, ledger)


if __name__ == "__main__":
    main()
