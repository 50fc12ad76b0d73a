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


def _report(record: Record, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeoptim.bench.tables import caption, columns

    head, body = columns(record)
    table = Table(*head)
    for cells in body:
        table.add_row(*cells)
    console = Console()
    console.print(table)
    console.print(caption(record))
    console.print(f"written to {record.write(out)}")
