"""``pipeoptim stability``: the largest learning rate that converges on a quadratic, stage by stage."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.stability.study import Stages, Study


def stability(
    optimizer: Annotated[str, Option(help="sgd, momentum (heavy ball), nesterov, adam or nadam; AdamW is adam here.")] = "adam",
    momentum: Annotated[float | None, Option(help="mu of momentum and nesterov; 0.9 by default.")] = None,
    beta1: Annotated[float | None, Option(help="Of adam and nadam; 0.9 by default.")] = None,
    gap: Annotated[int | None, Option(help="Version gap s of one stage that updates with every mini-batch.")] = None,
    stages: Annotated[int | None, Option(help="Instead of --gap: depth D, for a line per stage.")] = None,
    microbatches: Annotated[int, Option(help="With --stages: micro-batches M per mini-batch.")] = 1,
    method: Annotated[
        str | None, Option(help="With --stages: where F and B get their weights; pipeoptim_stash by default.")
    ] = None,
    slack: Annotated[
        str | None, Option(help="With --stages: more micro-batches in flight: a number, or one per boundary.")
    ] = None,
    prediction: Annotated[
        list[str] | None, Option(help="Kind of prediction; may be given several times. By default all that differ.")
    ] = None,
    discrepancy: Annotated[
        float,
        Option(
            help="Of methods with B on the latest weights: by how much of h their gradient depends on these, see docs/theory.md."
        ),
    ] = 0.0,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """The largest learning rate that is stable under a version gap, without and with each kind of prediction.

    A loss of curvature h, h x^2 / 2, is the yardstick: gradient descent without a gap converges on it up to lr * h = 2. A gap lowers
    that, a prediction raises it again, or lowers it further. The figures are computed from eigenvalues, in a second; nothing is
    trained. h is what your model's loss curves by in its steepest direction, for Adam in units of sqrt(v): compare figures with
    one another, for instance to scale a learning rate that works in synchronous training.

    \b
    Examples:
      pipeoptim stability --gap 7
          Adam on the first of 8 stages that update with every mini-batch.
      pipeoptim stability --optimizer adam --beta1 0.95 --gap 7 --prediction none --prediction refined
          Another beta1, two kinds of prediction.
      pipeoptim stability --optimizer momentum --stages 8 --microbatches 8
          Every stage where a mini-batch is split in eight.
      pipeoptim stability --stages 4 --method pipedream_2bw --microbatches 4
          A method with older weights.
      pipeoptim stability --stages 8 --method pipeoptim --discrepancy 0.2
          A backward on the latest weights, of which a fifth of the curvature depends.
    """
    from pipeoptim.stability.optimizers import linear_optimizer
    from pipeoptim.stability.study import COMPARED, study

    chosen = linear_optimizer(optimizer, _momentum(optimizer, momentum, beta1))
    if (gap is None) == (stages is None):
        raise ConfigError("give either --gap, for one stage, or --stages, for a whole pipeline: for example --gap 7")
    if not abs(discrepancy) <= 10:
        raise ConfigError(f"discrepancy is {discrepancy:g}, must be a number from -10 to 10")
    kinds = tuple(dict.fromkeys(prediction or COMPARED))
    if gap is not None:
        given = {"microbatches": microbatches != 1, "method": method, "slack": slack, "discrepancy": discrepancy}
        for name, value in given.items():
            if value:
                raise ConfigError(
                    f"{name} is of pipelines, and --gap of a single stage; give --stages instead of --gap, or leave it out"
                )
        models = _one_stage(gap)
    else:
        assert stages is not None
        models, kinds = _pipeline(
            stages, microbatches, method or "pipeoptim_stash", slack, discrepancy, kinds, prediction is not None
        )
    found = study(models, chosen, kinds)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, one=gap is not None)


def _momentum(optimizer: str, momentum: float | None, beta1: float | None) -> float | None:
    if beta1 is not None and optimizer not in ("adam", "nadam"):
        raise ConfigError(f"beta1 is {beta1:g}, which {optimizer!r} does not have; give --momentum, or leave it out")
    if momentum is not None and optimizer in ("adam", "nadam"):
        raise ConfigError(f"momentum is {momentum:g}, which {optimizer!r} does not have; give --beta1, or leave it out")
    return beta1 if momentum is None else momentum


def _one_stage(gap: int) -> Stages:
    from pipeoptim.schedule import Program
    from pipeoptim.stability.linear_stage import LinearStage
    from pipeoptim.stability.study import MOST_IN_FLIGHT

    if not 0 <= gap < MOST_IN_FLIGHT:
        raise ConfigError(f"gap is {gap}, must be from 0 to {MOST_IN_FLIGHT - 1}")
    program = Program("async_1f1b", gap + 1)
    return lambda optimizer, kind: [LinearStage(program, 0, optimizer, kind)]


def _pipeline(
    depth: int, m: int, name: str, slack: str | None, discrepancy: float, kinds: tuple[str, ...], asked: bool
) -> tuple[Stages, tuple[str, ...]]:
    from pipeoptim.methods import get_method
    from pipeoptim.schedule import read_slack
    from pipeoptim.stability.pipelines import linear_stages

    method = get_method(name)
    if depth > 10_000 or m > 10_000:
        raise ConfigError(
            f"{depth} stages with {m} micro-batches are too many to compute; set --stages or --microbatches to less"
        )
    program = method.program(depth, m, slack=0.0 if slack is None else read_slack(slack))
    if not method.forward.predicts:
        if asked and kinds != ("none",):
            raise ConfigError(
                f"method {name!r} does not predict; leave --prediction out, or choose pipeoptim or pipeoptim_stash"
            )
        kinds = ("none",)
    if discrepancy and method.backward.reuses_forward:
        raise ConfigError(
            f"discrepancy is {discrepancy:g}, but in method {name!r} B runs on the weights of F, so that there is none; leave it out, or "
            "choose naive or pipeoptim"
        )
    return lambda optimizer, kind: linear_stages(method, program, optimizer, kind, discrepancy), kinds


def _show(found: Study, one: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    kinds = list(found.stages[0].bounds)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ([] if one else ["stage"]) + ["gap", *kinds, "best"]:
        table.add_column(heading, justify="left" if heading == "best" else "right", no_wrap=True)
    for row in found.stages:
        cells = [str(row.gap), *(f"{row.bounds[kind]:.4g}" for kind in kinds), row.best if row.gap else "no gap"]
        table.add_row(*([] if one else [str(row.stage)]), *cells)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    optimizer = found.optimizer
    of = f", {'beta1' if 'adam' in optimizer.name else 'mu'} {optimizer.decay:g}" if optimizer.decay else ""
    console.print(f"{optimizer.name}{of}: largest stable lr * h; without any gap {found.synchronous:.4g}", soft_wrap=True)
    console.print(table)
    for sentence in found.advice:
        console.print(sentence, soft_wrap=True, markup=False)
