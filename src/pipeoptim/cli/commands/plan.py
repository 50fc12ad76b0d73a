"""``pipeoptim plan``: where to cut a model and what each method will cost, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.partitioning import Partition


def plan(
    recipe: Annotated[str, Option(help="Whose model and mini-batch, as for train.")] = "chars",
    tiny: Annotated[bool, Option("--tiny", help="The recipe's tiny form.")] = False,
    stages: Annotated[int | None, Option(help="Depth; by default the recipe's.")] = None,
    microbatches: Annotated[int | None, Option(help="Micro-batches per mini-batch; by default the recipe's.")] = None,
    method: Annotated[str, Option(help="The method whose memory counts for the cut.")] = "pipeoptim",
    speed: Annotated[list[float] | None, Option(help="Relative speed of each stage's device; once per stage.")] = None,
    memory: Annotated[list[float] | None, Option(help="GiB of each stage's device; once per stage.")] = None,
    pin: Annotated[list[int] | None, Option(help="A block before which a stage must begin; may be repeated.")] = None,
    svg: Annotated[Path | None, Option(help="Also draw the schedule of the method into this file.")] = None,
) -> None:
    """Measure a model's blocks on this machine, cut it, and say what every method will cost.

    The cut is the best contiguous one for the slowest stage, under the memory limits and pins that are given. Nothing is
    trained and nothing is written, unless --svg asks for it.

    \b
    Examples:
      pipeoptim plan --stages 2
      pipeoptim plan --recipe resnet101-tinyimagenet --tiny --stages 4 --speed 1 --speed 1 --speed 2 --speed 2
      pipeoptim plan --stages 4 --pin 3 --memory 1 --memory 1 --memory 1 --memory 2
    """
    import torch

    from pipeoptim.methods import get_method
    from pipeoptim.partitioning import partition
    from pipeoptim.train.parts import read_data, seeded
    from pipeoptim.train.recipes import get_recipe
    from pipeoptim.train.targets import build

    config = get_recipe(recipe, tiny)
    depth, m = stages or config.stages, microbatches or config.microbatches
    chosen = get_method(method)
    torch.set_num_threads(config.threads)
    x, _ = read_data(config).train_batch(0, config.batch_size)
    with seeded(config.seed):
        model = build("model", config.model)
    limits = [int(gib * 2**30) for gib in memory] if memory else None
    found = partition(model, depth, (x,), speeds=speed, memory=limits, pins=pin or (), method=chosen, microbatches=m)
    _show(found, depth, m)
    if svg is not None:
        from pipeoptim.schedule import to_svg

        if svg.exists():
            raise ConfigError(f"{svg} exists; choose another file for --svg")
        svg.write_text(to_svg(chosen.program(depth, m), max(2, 2 * depth // m)))
        print(f"schedule drawn in {svg}")


def _show(found: Partition, depth: int, m: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from pipeoptim.methods import METHODS, copies
    from pipeoptim.partitioning.forecast import seconds_per_minibatch

    print(found.to_text())
    table = Table(Column("method", no_wrap=True), "mini-batches/s", "busy", "largest gap", "most copies", "why not")
    for name, method in sorted(METHODS.items()):
        try:
            program = method.program(depth, m)
        except ConfigError as error:
            table.add_row(name, "", "", "", "", str(error).split(": ", 1)[-1])
            continue
        seconds = seconds_per_minibatch(program, found.seconds)
        busy = sum(found.seconds) / (depth * seconds)
        gaps = max(program.steady_gap(k) for k in range(depth))
        most = max(copies(method, depth, m, k) for k in range(depth))
        table.add_row(name, f"{1 / seconds:.3g}", f"{busy:.0%}", str(gaps), str(most), "")
    Console().print(table)
    print(f"{depth} stages, {m} micro-batches per mini-batch; forecast from the measured blocks, without transfers and updates")
