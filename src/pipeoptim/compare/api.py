"""``compare`` takes settings and a folder and returns a comparison; ``pipeoptim compare`` and scripts call it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from pipeoptim.compare.folder import ComparisonFolder, write_text
from pipeoptim.compare.outcome import is_done, read_outcome
from pipeoptim.compare.plan import ComparisonPlan, plan_comparison
from pipeoptim.compare.pool import do_runs
from pipeoptim.compare.progress import Progress
from pipeoptim.compare.settings import ComparisonSettings
from pipeoptim.compare.summary import Comparison, to_csv
from pipeoptim.errors import ConfigError


def compare(settings: ComparisonSettings, out: Path, jobs: int = 1, progress: bool = True, command: str = "") -> Comparison:
    """Execute the runs of ``settings`` that ``out`` does not hold yet, ``jobs`` at a time; write the summaries.

    Raises:
        ConfigError: the comparison is impossible, or ``out`` holds another one; nothing was written.
        KeyboardInterrupt: Ctrl-C; what is finished is kept, calling again continues.
    """
    from pipeoptim.train.machine import machine

    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}, must be at least 1: how many runs go on at the same time")
    folder, plan = ComparisonFolder(out), plan_comparison(settings)
    if not folder.about.exists():
        _check(plan)
    folder.begin(settings, command, machine())
    todo = [run for run in plan.runs if not is_done(folder.run(run.name))]
    with Progress(folder, len(plan.runs), len(plan.runs) - len(todo), settings.config.steps, quiet=not progress) as view:
        do_runs(folder, todo, jobs, view)
    return write_summaries(folder)


def read(folder: ComparisonFolder) -> Comparison:
    """The comparison in ``folder``, as far as it has come.

    Raises:
        ConfigError: there is none.
    """
    settings = folder.read_settings()
    plan = plan_comparison(settings)
    order = {name: n for n, name in enumerate(settings.methods)}
    ended = [read_outcome(run, folder.run(run.name)) for run in plan.runs if (folder.run(run.name) / "outcome.json").exists()]
    refused = {o.method: o.reason for o in ended if o.status == "refused"}
    outcomes = [o for o in ended if o.status != "refused"]
    outcomes.sort(key=lambda o: (order[o.method], settings.seeds.index(o.seed)))
    return Comparison(settings, outcomes, {**plan.left_out, **refused})


def write_summaries(folder: ComparisonFolder) -> Comparison:
    """``summary.json`` and ``summary.csv`` of what is there."""
    comparison = read(folder)
    entries = comparison.entries()
    write_text(folder.summary, json.dumps(entries, indent=2, allow_nan=False) + "\n")
    write_text(folder.table, to_csv(entries))
    return comparison


def _check(plan: ComparisonPlan) -> None:
    """Build the model once and make every optimizer, so that what cannot work is refused before anything is written."""
    from pipeoptim.train import optimizers
    from pipeoptim.train.checks import check
    from pipeoptim.train.setup import build_setup, cpu_threads, probe_setup

    for run in plan.runs:
        check(run.config)
    first = plan.runs[0].config
    with cpu_threads(first.threads):
        setup = build_setup(first)
        for component in {run.config.optimizer.target: run.config.optimizer for run in plan.runs}.values():
            probe_setup(replace(setup, optimizer=optimizers.factory(component)))
