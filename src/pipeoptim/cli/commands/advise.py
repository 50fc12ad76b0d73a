"""``pipeoptim advise``: which method, M, slack and prediction, from what a user has."""

from __future__ import annotations

import json
from dataclasses import replace
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.advise import Advice, Situation
    from pipeoptim.config import TrainConfig


def advise(
    stages: Annotated[int | None, Option(help="Depth D; with --run by default that of the run.")] = None,
    microbatches: Annotated[int | None, Option(help="M, where it is given; by default it is chosen.")] = None,
    batch_size: Annotated[int | None, Option(help="Rows of a mini-batch: the largest M that can be chosen.")] = None,
    optimizer: Annotated[str | None, Option(help="As for train: adamw (default), sgd, momentum, muon_adamw, ...")] = None,
    memory: Annotated[float | None, Option(help="GiB of a device. Give --weights as well.")] = None,
    weights: Annotated[float | None, Option(help="GiB of the weights of the largest stage.")] = None,
    activations: Annotated[float, Option(help="GiB of activations that a stage keeps of one micro-batch.")] = 0.0,
    copies: Annotated[int | None, Option(help="Instead of --memory: copies of its weights that a device has room for.")] = None,
    late: Annotated[
        float | None, Option(help="How late messages come, in times of a stage's forward and backward; for slack.")
    ] = None,
    exact: Annotated[bool, Option("--exact", help="The result must equal synchronous training.")] = False,
    run: Annotated[
        str | None,
        Option(
            help="A run to learn from: depth, mini-batch, optimizer, times of stages and, with --monitor-every, prediction errors."
        ),
    ] = None,
    out: Annotated[Path, Option(help="Folder of the runs.")] = Path("runs"),
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Which regime is mine: method, micro-batches, slack, prediction and the backward's weights, with reasons and expected cost.

    The decision is the tree of docs/choosing.md, which --method auto of train walks as well. What is not given counts as unknown:
    without a word on memory there is room for two copies of the weights and not for more.

    \b
    Examples:
      pipeoptim advise --stages 8
          A pipeline of 8 stages, AdamW, everything else free.
      pipeoptim advise --stages 8 --microbatches 1 --memory 80 --weights 2
          No mini-batch is split; 80 GiB, of which the largest stage's weights are 2.
      pipeoptim advise --stages 4 --late 0.3 --optimizer muon_adamw
          Messages come late by 0.3 times of a stage.
      pipeoptim advise --run chars-pipeoptim
          From runs/chars-pipeoptim; train it with --monitor-every 10 to have its predictions judged.
    """
    from pipeoptim.advise import Situation
    from pipeoptim.advise import advise as advice_for

    config, relative_error, slowest = _of_run(out / run) if run is not None else (None, None, None)
    if stages is None and config is None:
        raise ConfigError("stages is not given, must be the depth of the pipeline: for example --stages 8, or --run NAME")
    depth = stages if stages is not None else config.stages if config is not None else 1
    name, momentum = _optimizer(optimizer, config)
    situation = Situation(
        depth,
        microbatches,
        batch_size if batch_size is not None or config is None else config.batch_size // config.replicas,
        optimizer=name,
        momentum=momentum,
        copies=copies,
        exact=exact,
        relative_error=relative_error,
        late=late,
        slowest=slowest,
    )
    if depth * situation.m > 10_000:
        raise ConfigError(
            f"{depth} stages with {situation.m} micro-batches would take long to count; set stages or microbatches to less"
        )
    if memory is not None or weights is not None:
        situation = replace(situation, copies=_room(memory, weights, activations, copies, situation))
    elif activations:
        raise ConfigError(
            f"activations is {activations:g}, which means something beside --memory and --weights only; give them"
        )
    found = advice_for(situation)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found)


def _of_run(path: Path) -> tuple[TrainConfig, float | None, float | None]:
    """Its configuration, and what it has measured: the median of the relative errors of its predictions at the end, and the
    time of its slowest stage over the mean."""
    from statistics import mean, median

    from pipeoptim.telemetry.metrics import read_rows
    from pipeoptim.train.rundir import RunDir

    directory = RunDir(path)
    config = directory.read_config()
    metrics = read_rows(directory.metrics)
    rows = [row["prediction"] for row in metrics if isinstance(row.get("prediction"), list)]
    # The newest few, as the first predictions of a run are made from a momentum that has not settled.
    errors = [stage.get("relative_error") for row in rows[-5:] for stage in row if isinstance(stage, dict)]
    known = [error for error in errors if isinstance(error, (int, float)) and error >= 0]
    timings = [row["timing"] for row in metrics if isinstance(row.get("timing"), list)]
    seconds = [stage.get("computing") for stage in (timings[-1] if timings else ()) if isinstance(stage, dict)]
    measured = [s for s in seconds if isinstance(s, (int, float)) and s > 0]
    return config, median(known) if known else None, max(measured) / mean(measured) if len(measured) > 1 else None


def _optimizer(name: str | None, config: TrainConfig | None) -> tuple[str, float]:
    """Name and smallest momentum over the stages."""
    from pipeoptim.config import Component
    from pipeoptim.train.automatic import momenta

    component = config.optimizer if name is None and config is not None else Component(name or "adamw")
    return component.target, min(momenta(component))


def _room(memory: float | None, weights: float | None, activations: float, copies: int | None, situation: Situation) -> int:
    """Copies of the weights for which there is room beside gradients, two moments and the activations in flight."""
    if memory is None or weights is None or copies is not None:
        raise ConfigError("give either --copies, or both --memory and --weights")
    for name, value in (("memory", memory), ("weights", weights), ("activations", activations)):
        if not (0 <= value < float("inf")) or (not value and name != "activations"):
            raise ConfigError(f"{name} is {value:g}, must be a positive number of GiB")
    others = weights * 3 + activations * situation.stages
    room = floor((memory - others) / weights)
    if room < 1:
        raise ConfigError(
            f"memory is {memory:g} GiB, but gradients, two moments and the activations of {situation.stages} micro-batches take "
            f"{others:g} GiB beside weights of {weights:g} GiB; use more stages, or recompute activations"
        )
    return min(room, 10_000)


def _show(found: Advice) -> None:
    kind = f", prediction {found.prediction}" if found.prediction else ""
    typer.echo(f"{found.method}{kind}, M = {found.microbatches}, slack {found.slack:g}")
    where = {"same": "B on the weights of F, which are the latest", "latest": "B on the latest weights"}
    typer.echo(
        f"{where.get(found.backward, 'B on the weights of F')}; gap {found.gap}; at most {_copies(found)} of the weights"
    )
    for question, answer in found.asked:
        typer.echo(f"  {question} {'yes' if answer else 'no'}")
    for reason in found.reasons:
        typer.echo(reason)
    typer.echo(f"Cost of staleness: {found.cost}")
    option = f" --prediction {found.prediction}" if found.prediction else ""
    slack = f" --slack {found.slack:g}" if found.slack else ""
    typer.echo(
        f"pipeoptim train --method {found.method}{option} --stages {found.stages} --microbatches {found.microbatches}{slack}"
    )


def _copies(found: Advice) -> str:
    return f"{found.copies} cop{'y' if found.copies == 1 else 'ies'}"
