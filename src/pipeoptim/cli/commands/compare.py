"""``pipeoptim compare``: the same recipe under several methods, side by side."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeoptim.cli.settings import (
    ConfigFileOption,
    DataOption,
    LearningRateOption,
    ModelOption,
    OptimizerOption,
    SetOption,
    TinyOption,
    given,
    takes_settings,
    with_given,
)
from pipeoptim.config import SETTINGS
from pipeoptim.errors import ConfigError, counted

if TYPE_CHECKING:
    from pipeoptim.compare.summary import Comparison
    from pipeoptim.config import TrainConfig

#: Validations per run where neither the recipe nor --eval-every says otherwise: enough points for a curve.
VALIDATIONS = 10

#: Seeds that --seeds N may stand for.
MOST_SEEDS = 1000


#: Settings that all runs share: those that change what a run computes, but for what differs between the runs; and three more.
SHARED = tuple(
    name
    for name, known in SETTINGS.items()
    if known.offered
    and (known.computes or name in ("steps", "eval_every", "engine"))
    and name not in ("method", "seed", "threads")
)

#: Where a comparison begins otherwise than a run.
BEGINS_WITH = {"prediction": "paper", "engine": "emulator", "checkpoint_every": 0}


@takes_settings(
    *SHARED,
    after="seeds",
    defaults=BEGINS_WITH,
    cut="Blocks of each stage, as 3,2,2,1; by default even numbers of parameters.",
    steps="Mini-batches of each run.",
    eval_every="Steps between validations; by default ten per run.",
    checkpoint_every="Steps between checkpoints, for very long runs. The pipeline drains at each; 0: none.",
)
def compare(
    methods: Annotated[str, Option(help="Names with commas between them (see pipeoptim methods), or all.")] = "all",
    recipe: Annotated[
        str | None, Option(help="What to train: chars (default), digits, or module:function or file.py:function of your own.")
    ] = None,
    model: ModelOption = None,
    data: DataOption = None,
    set_options: SetOption = None,
    config_file: ConfigFileOption = None,
    seeds: Annotated[str, Option(help="How many seeds (3), or which ones (0,1,2).")] = "1",
    optimizer: OptimizerOption = None,
    lr: LearningRateOption = None,
    same_optimizer: Annotated[
        bool, Option("--same-optimizer", help="Also for methods that bring their own (nesterov: NAdam).")
    ] = False,
    own_lr: Annotated[float | None, Option(help="Learning rate of optimizers that methods bring along.")] = None,
    target: Annotated[
        float | None,
        Option(help="Validation loss whose first crossing is timed; by default what the synchronous method reaches."),
    ] = None,
    jobs: Annotated[int | None, Option(help="Runs at the same time; by default as many as cores.")] = None,
    tiny: TinyOption = False,
    out: Annotated[Path | None, Option(help="Folder of the comparison; by default runs/compare-<recipe>.")] = None,
    quiet: Annotated[bool, Option("--quiet", help="No progress and no table.")] = False,
    **settings: Any,
) -> None:
    """Train one recipe with several methods and compare them.

    Every method and seed is one run, in --out/runs/. Afterwards --out holds report.html (curves, table, schedules; open
    it in a browser), summary.json and summary.csv. A run that diverges is a result. A method that is not defined for the
    setting is left out, with the reason.

    \b
    Examples:
      pipeoptim compare --steps 200
          All methods on the default recipe.
      pipeoptim compare --methods gpipe,pipedream,pipeoptim --recipe digits --seeds 3
          Three methods, three seeds each: mean and spread.
      pipeoptim compare --methods 1f1b,naive,pipeoptim --microbatches 1 --stages 6 --lr 0.001
          The hard setting: mini-batches are not split, gaps grow with depth.
      pipeoptim compare --methods 1f1b,pipeoptim --engine processes
          One process per stage: loss against wall-clock time.

    Ctrl-C stops; the same command again continues with the runs that are missing.
    """
    import os
    import shlex
    import sys

    import typer

    from pipeoptim.compare.api import compare as run_comparison
    from pipeoptim.compare.report import write_report
    from pipeoptim.compare.settings import ComparisonSettings
    from pipeoptim.train.config_file import chosen_run
    from pipeoptim.train.layout import layout_of

    chosen, _ = chosen_run(recipe, tiny, config_file, model, data, "chars", set_options or ())
    config = _config(chosen, given(settings), optimizer, lr)
    compared = ComparisonSettings(config, _methods(methods), _seeds(seeds), same_optimizer, _positive("own-lr", own_lr), target)
    folder = out or Path("runs") / f"compare-{config.recipe.replace(':', '.').replace('/', '.')}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = (
        jobs if jobs is not None else max(1, cores // (layout_of(config).processes if config.engine == "processes" else 1))
    )
    try:
        comparison = run_comparison(compared, folder, at_once, not quiet, shlex.join(["pipeoptim", *sys.argv[1:]]))
    except KeyboardInterrupt as error:
        print(f"stopped; finished runs are kept in {folder}. The same command again continues.", file=sys.stderr)
        raise typer.Exit(130) from error
    write_report(folder)
    if not quiet:
        show(comparison, folder)
    failed = [o for o in comparison.outcomes if o.status == "failed"]
    if failed:
        runs = ", ".join(f"{o.method} seed {o.seed} ({o.reason})" for o in failed)
        print(f"pipeoptim: {len(failed)} of {counted(len(comparison.outcomes), 'run')} failed: {runs}", file=sys.stderr)
        raise typer.Exit(1)


def _config(chosen: TrainConfig, changed: dict[str, Any], optimizer: str | None, lr: float | None) -> TrainConfig:
    """The chosen configuration with what was given; one thread per run, as many validations as a curve needs."""
    from pipeoptim.train.checks import check_settings
    from pipeoptim.train.optimizers import switch
    from pipeoptim.train.setup import with_steps
    from pipeoptim.train.shorten import shortened

    config = with_given(replace(chosen, threads=1, export=False), changed)  # of its runs nobody wants the weights
    check_settings(config)
    config = with_steps(config)
    if "eval_every" not in changed:
        config = replace(config, eval_every=max(1, config.steps // VALIDATIONS))
    if optimizer is not None:
        config = replace(config, optimizer=switch(config.optimizer, optimizer))
    if lr is not None:
        config = replace(config, optimizer=config.optimizer.with_options(lr=lr))
    return shortened(config)


def _methods(text: str) -> tuple[str, ...]:
    from pipeoptim.methods import METHODS

    parts = re.split(r",(?![^(]*\))", text)  # a comma between parentheses separates options of a method
    names = tuple(dict.fromkeys(name.strip() for name in parts if name.strip()))
    if not names:
        raise ConfigError(f"methods is {text!r}, must be names with commas between them, or all; see pipeoptim methods")
    return tuple(METHODS) if names == ("all",) else names


def _seeds(text: str) -> tuple[int, ...]:
    """``3`` is how many, ``0,1,2`` are which; ``0`` alone is the seed 0."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"seeds is {text!r}, must be how many (3) or which ones (0,1,2)")
    if "," not in text and numbers[0] > MOST_SEEDS:
        raise ConfigError(
            f"seeds is {text!r}, but at most {MOST_SEEDS} are trained; to train with this one, set --seeds {text},"
        )
    return tuple(range(max(1, numbers[0]))) if "," not in text else tuple(dict.fromkeys(numbers))


def _positive(name: str, value: float | None) -> float | None:
    import math

    if value is not None and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value!r}, must be a finite number above 0, for example 0.001")
    return value


def show(comparison: Comparison, folder: Path) -> None:
    """The table in the terminal, the notes below it, and where everything is."""
    from rich.table import Table

    from pipeoptim.compare.table import columns, fitting, notes, setting
    from pipeoptim.telemetry.console import table_console

    console = table_console()
    config, seeds = comparison.settings.config, len(comparison.settings.seeds)
    console.print(
        f"{config.recipe}: {setting(config)}, {counted(seeds, 'seed')}, prediction {config.prediction}",
        soft_wrap=True,
    )
    head, dropped = fitting(columns(comparison), comparison.lines(), console.width)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for n, column in enumerate(head):
        table.add_column(column.heading, justify="left" if n == 0 or column.heading == "optimizer" else "right", no_wrap=True)
    for line in comparison.lines():
        table.add_row(*(column.cell(line) for column in head))
    console.print(table)
    if dropped:
        console.print(f"no room for {', '.join(dropped)}: see the report", soft_wrap=True)
    for note in notes(comparison):
        console.print(f"- {note}", soft_wrap=True, markup=False)
    for label, name in (("report", "report.html"), ("summary", "summary.json"), ("table", "summary.csv")):
        console.print(f"{label}: {folder / name}", soft_wrap=True)
