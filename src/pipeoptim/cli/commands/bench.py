"""``pipeoptim bench``: speed, measured; one sub-command per benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

if TYPE_CHECKING:
    from pipeoptim.bench.record import Record

bench = typer.Typer(
    help="Measure speed: every figure is a ratio of medians in one run, written as JSON.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.callback()
def _group() -> None:
    pass


@bench.command()
def throughput(
    model: Annotated[str, Option(help="What is trained: mlp.")] = "mlp",
    batch: Annotated[int, Option(help="Size of the mini-batch.")] = 64,
    optimizer: Annotated[str, Option(help="Class of torch.optim.")] = "AdamW",
    method: Annotated[list[str] | None, Option(help="Method to measure; may be given several times.")] = None,
    repeats: Annotated[int, Option(help="Windows per contender; the median is reported.")] = 5,
    window: Annotated[float, Option(help="Seconds per window.")] = 1.0,
    out: Annotated[Path, Option(help="Where the JSON goes.")] = Path("benchmarks/results/throughput.json"),
) -> None:
    """Samples per second beside torch's own ScheduleGPipe and Schedule1F1B.

    Two processes of one thread each train the same stages on the same mini-batch; torch's schedules with 2, 4 and 8
    micro-batches. Takes about a minute and a half.

    Example:

        pipeoptim bench throughput --method pipeoptim --method naive
    """
    from pipeoptim.bench.throughput import measure

    _report(measure(model, batch, optimizer, method, repeats=repeats, window=window), out)


@bench.command()
def predict(
    weights: Annotated[float, Option(help="Number of weights, in the shapes of a GPT.")] = 100e6,
    threads: Annotated[
        list[int] | None, Option(help="Threads; may be given several times. By default 1 and all cores.")
    ] = None,
    optimizer: Annotated[
        list[str] | None, Option(help="Class of torch.optim; may be given several times. By default all.")
    ] = None,
    repeats: Annotated[int, Option(help="Turns per contender; the median is reported.")] = 9,
    budget: Annotated[float, Option(help="Seconds per optimizer after which no more turns are taken (at least 3 are).")] = 3.0,
    add: Annotated[bool, Option("--add", help="Keep what the file holds of other optimizers and numbers of threads.")] = False,
    out: Annotated[Path, Option(help="Where the JSON goes.")] = Path("benchmarks/results/predict.json"),
) -> None:
    """What a prediction adds to the step of every optimizer, beside the number of passes over memory that it needs.

    Ratios to the fastest step that torch has for the optimizer: step and prediction in one pass (fused), one after the other,
    and by the last displacement. With 100 million weights it takes 10 minutes and 6 GB of memory.

    \b
    Examples:
      pipeoptim bench predict --weights 20e6 --threads 1
          Two minutes.
      pipeoptim bench predict --optimizer AdamW --optimizer SGD --add
          Measures these two anew and leaves the rest of the file as it is.
    """
    from pipeoptim.bench.predict import measure, merged
    from pipeoptim.bench.record import Record
    from pipeoptim.errors import ConfigError

    if weights < 1e6 or min(threads or [1]) < 1 or repeats < 1:
        raise ConfigError(
            f"weights={weights:g}, threads={threads}, repeats={repeats}: at least a million weights, 1 thread and 1 repeat"
        )
    record = measure(weights, threads, repeats, budget, optimizer)
    _report(merged(Record.read(out), record) if add and out.is_file() else record, out)


def _report(record: Record, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeoptim.bench.tables import caption, columns

    head, body = columns(record)
    table = Table(*head)
    for cells in body:
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a pipe or a file has no width of its own
    console.print(table)
    console.print(caption(record))
    console.print(f"written to {record.write(out)}")
