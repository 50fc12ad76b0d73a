"""``pipeoptim bench``: speed, measured; one sub-command per benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pipeoptim.bench.checks import above_zero, at_least, at_most
from pipeoptim.cli.new_files import check_writable
from pipeoptim.errors import ConfigError

if TYPE_CHECKING:
    from pipeoptim.bench.record import Record

bench = typer.Typer(
    help="""Measure speed and memory: every figure is a ratio of medians in one run, written as JSON with all samples.

    Documents get their tables from these files: python benchmarks/render.py
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.callback()
def _group() -> None:
    pass


def _checked_file(path: Path | None) -> Path | None:
    """Before anything is measured: what was measured must not be lost."""
    if path is None:
        return None
    if not path.name or path.is_dir():
        raise ConfigError(f"out is {str(path)!r}, must be the name of a file, for example {path / 'result.json'}")
    if path.exists() and not path.is_file():  # a device would be replaced
        raise ConfigError(f"out is {str(path)!r}, which is no file; choose another one, for example result.json")
    check_writable(next(folder for folder in path.parents if folder.exists()), "--out")  # the rest of them is made
    return path


_OUT = Option(help="Where the JSON goes.", callback=_checked_file)
_ADD = Option("--add", help="Keep what the file holds of what is not measured now.")


@bench.command()
def throughput(
    model: Annotated[str, Option(help="What is trained: mlp, or module:function of a builder.")] = "mlp",
    batch: Annotated[
        list[int] | None, Option(help="Size of the mini-batch; may be given several times. By default 64.")
    ] = None,
    optimizer: Annotated[str, Option(help="Class of torch.optim.")] = "AdamW",
    method: Annotated[list[str] | None, Option(help="Method; may be given several times. By default all.")] = None,
    microbatches: Annotated[list[int] | None, Option(help="M of the methods; several times. By default 1 and 2.")] = None,
    torch_microbatches: Annotated[
        list[int] | None, Option(help="M of torch's schedules; several times. By default 1, 2, 4 and 8, where possible.")
    ] = None,
    repeats: Annotated[int, Option(help="Windows per contender; the median is reported.")] = 5,
    window: Annotated[float, Option(help="Seconds per window.")] = 0.5,
    fused: Annotated[bool, Option("--fused", help="All contenders get torch's fused step of the optimizer.")] = False,
    refresh: Annotated[
        list[int] | None,
        Option(
            help="Also with predictions from the mini-batch in progress, made anew after so many micro-batches; several times."
        ),
    ] = None,
    add: Annotated[bool, _ADD] = False,
    out: Annotated[Path, _OUT] = Path("benchmarks/results/throughput.json"),
) -> None:
    """Samples per second of all methods beside torch's own schedules, each at its best M.

    Two processes of one thread each train the same model on the same mini-batch; against ScheduleGPipe, Schedule1F1B,
    ScheduleInterleaved1F1B and ScheduleZBVZeroBubble, the last two with two stages per process. About three minutes per mini-batch.

    \b
    Examples:
      pipeoptim bench throughput --method pipeoptim --method naive
      pipeoptim bench throughput --model pipeoptim_zoo.speed:gpt --batch 8 --batch 32 --add
    """
    from pipeoptim.bench.throughput import measure

    at_least(1, batch=batch, microbatches=microbatches, torch_microbatches=torch_microbatches, repeats=repeats, refresh=refresh)
    above_zero(window=window)
    _check_kept("throughput", out, add)
    found = measure(model, batch, optimizer, method, microbatches, torch_microbatches, 2, repeats, window, fused, refresh)
    _report(found, out, add)


@bench.command()
def efficiency(
    depth: Annotated[list[int] | None, Option(help="Stages, a process each; several times. By default 2, 4 and 8.")] = None,
    milliseconds: Annotated[list[float] | None, Option(help="Time of a stage for a mini-batch; several times. 10.")] = None,
    method: Annotated[list[str] | None, Option(help="Method; several times. By default pipeoptim and naive.")] = None,
    microbatches: Annotated[list[int] | None, Option(help="M of the methods; several times. By default 1.")] = None,
    torch_microbatches: Annotated[
        list[int] | None, Option(help="M of torch's schedules; several times. By default none.")
    ] = None,
    jitter: Annotated[float, Option(help="Sigma of a log-normal factor on every wait.")] = 0.0,
    uneven: Annotated[float, Option(help="How much slower the middle stage is: 0.5 for half as long again.")] = 0.0,
    delay: Annotated[float, Option(help="Milliseconds that every message is late.")] = 0.0,
    bandwidth: Annotated[float, Option(help="Megabytes per second of each link; 0 for no limit.")] = 0.0,
    transport: Annotated[
        str, Option(help="auto, or group: send through gloo, as torch's schedules do; then only methods are measured.")
    ] = "auto",
    slack: Annotated[str, Option(help="More micro-batches in flight in the methods, as for train: x, or 0,x,0.")] = "0",
    refresh: Annotated[
        list[int] | None,
        Option(
            help="Also with predictions from the mini-batch in progress, made anew after so many micro-batches; several times."
        ),
    ] = None,
    repeats: Annotated[int, Option(help="Windows per contender; the median is reported.")] = 9,
    steps: Annotated[int, Option(help="Mini-batches per window.")] = 40,
    add: Annotated[bool, _ADD] = False,
    out: Annotated[Path, _OUT] = Path("benchmarks/results/efficiency.json"),
) -> None:
    """Throughput times the slowest stage's own time, on stages that wait instead of computing: 1 is the limit.

    \b
    Examples:
      pipeoptim bench efficiency --depth 8 --microbatches 8 --torch-microbatches 8
      pipeoptim bench efficiency --depth 4 --delay 2 --bandwidth 10 --add
      pipeoptim bench efficiency --depth 4 --method pipeoptim --delay 3 --slack 1 --add
    """
    from pipeoptim.bench.efficiency import measure
    from pipeoptim.engine.transport.unix_channel import check_transport

    check_transport(transport)
    at_least(
        1,
        depth=depth,
        microbatches=microbatches,
        torch_microbatches=torch_microbatches,
        repeats=repeats,
        steps=steps,
        refresh=refresh,
    )
    at_least(0, jitter=jitter, uneven=uneven, delay=delay, bandwidth=bandwidth)
    above_zero(milliseconds=milliseconds)
    _check_kept("efficiency", out, add)
    record = measure(
        depth or [2, 4, 8],
        milliseconds or [10.0],
        method,
        microbatches,
        torch_microbatches,
        jitter,
        uneven,
        delay / 1e3,
        bandwidth * 1e6,
        transport,
        slack,
        refresh,
        repeats=repeats,
        steps=steps,
    )
    _report(record, out, add)


@bench.command()
def slack(
    depth: Annotated[list[int] | None, Option(help="Stages; several times. By default 4, 8, 16 and 32.")] = None,
    slack: Annotated[list[float] | None, Option(help="Slack; several times. By default 0, 0.5, 1 and 2.")] = None,
    add: Annotated[bool, _ADD] = False,
    out: Annotated[Path, Option(help="Where the JSON goes.")] = Path("benchmarks/results/slack.json"),
) -> None:
    """What slack can win where messages are late or stages vary, computed from the action program: nothing is measured.

    Some seconds; `bench efficiency --delay --jitter --slack` measures it.
    """
    from pipeoptim.bench.slack_model import measure

    at_least(1, depth=depth)
    at_least(0, slack=slack)
    _check_kept("slack", out, add)
    _report(measure(depth or [4, 8, 16, 32], slack or [0.0, 0.5, 1.0, 2.0]), out, add)


@bench.command()
def transfer(
    model: Annotated[
        list[str] | None,
        Option(help="What is trained, with its mini-batch: mlp=64 (default), or module:function=8. Several times."),
    ] = None,
    megabits: Annotated[
        list[float] | None, Option(help="Megabits per second of each link; several times. By default 1000, 100 and 10.")
    ] = None,
    method: Annotated[str, Option(help="Method.")] = "pipeoptim",
    repeats: Annotated[int, Option(help="Windows per contender; the median is reported.")] = 5,
    window: Annotated[float, Option(help="Seconds per window.")] = 0.5,
    add: Annotated[bool, _ADD] = False,
    out: Annotated[Path, _OUT] = Path("benchmarks/results/transfer.json"),
) -> None:
    """Samples per second over slow links, with activations and gradients sent as they are, as bf16 and as int8.

    Two processes of one thread each; each direction between them has a link of its own. About 30 seconds per model and link.

    \b
    Examples:
      pipeoptim bench transfer --megabits 100
      pipeoptim bench transfer --model mlp=64 --model pipeoptim_zoo.speed:gpt=8
    """
    from pipeoptim.bench.transfer import measure

    at_least(1, repeats=repeats)
    above_zero(window=window, megabits=megabits)
    models = dict(_sized(text) for text in model or ["mlp=64"])
    _check_kept("transfer", out, add)
    _report(measure(models, megabits or [1000.0, 100.0, 10.0], method, repeats, window), out, add)


@bench.command()
def memory(
    depth: Annotated[list[int] | None, Option(help="Stages; several times. By default 2 to 8.")] = None,
    method: Annotated[list[str] | None, Option(help="Method; several times. By default all.")] = None,
    slack: Annotated[float, Option(help="More micro-batches in flight per boundary, in methods that can have it.")] = 0.0,
    add: Annotated[bool, _ADD] = False,
    out: Annotated[Path, _OUT] = Path("benchmarks/results/memory.json"),
) -> None:
    """The most weights and activations that each stage holds under each method, measured beside what is promised.

    With M = 1 and M = D. About a minute.
    """
    from pipeoptim.bench.memory import measure

    at_least(1, depth=depth)
    at_least(0, slack=[slack])
    _check_kept("memory", out, add)
    _report(measure(depth, method, slack=slack), out, add)


@bench.command()
def stability(out: Annotated[Path, _OUT] = Path("benchmarks/results/stability.json")) -> None:
    """The tables of docs/theory.md: largest stable learning rates, errors of predictions. Computed in some seconds, not measured."""
    from pipeoptim.bench.stability import measure

    _report(measure(), out)


@bench.command()
def scaling(
    method: Annotated[str, Option(help="Method.")] = "pipeoptim",
    updates: Annotated[int, Option(help="Length of the long run.")] = 10_000,
    repeats: Annotated[int, Option(help="Turns per contender; the median is reported.")] = 5,
    out: Annotated[Path, _OUT] = Path("benchmarks/results/scaling.json"),
) -> None:
    """What a mini-batch costs as stages, tensors, weights, M and the length of the run grow. About two minutes."""
    from pipeoptim.bench.scaling import measure

    at_least(1, repeats=repeats)
    _report(measure(method, updates, repeats), out)


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A result file.")], new: Annotated[Path, typer.Argument(help="A later one.")]
) -> None:
    """What moved between two result files, beyond noise.

    A row has moved when no sample of one file lies among those of the other, and the bootstrap interval (95 %) of the ratio of
    medians does not contain 1.

    Example:

        pipeoptim bench compare before.json benchmarks/results/throughput.json
    """
    from pipeoptim.bench.difference import compare as changes
    from pipeoptim.bench.difference import differing_machines
    from pipeoptim.bench.record import Record

    a, b = Record.read(old), Record.read(new)
    found = changes(a, b)
    for line in differing_machines(a, b):
        typer.echo(f"not the same: {line}")
    for change in sorted(found, key=lambda change: not change.moved):
        verdict = "moved" if change.moved else "noise"
        typer.echo(f"{verdict}  {change.ratio:.3f} ({change.low:.3f} .. {change.high:.3f})  {change.name}")
    typer.echo(f"{sum(change.moved for change in found)} of {len(found)} rows moved beyond noise (new / old, {b.unit})")


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
    device: Annotated[str, Option(help="cpu, cuda or cuda:N: a GPU is timed by its own events, beside a copy on it.")] = "cpu",
    add: Annotated[bool, Option("--add", help="Keep what the file holds of other optimizers and numbers of threads.")] = False,
    out: Annotated[
        Path | None,
        Option(
            help="Where the JSON goes. By default benchmarks/results/predict.json, of a GPU predict_cuda.json beside it.",
            callback=_checked_file,
        ),
    ] = None,
) -> None:
    """What a prediction adds to the step of every optimizer, beside the number of passes over memory that it needs.

    Ratios to the fastest step that torch has for the optimizer: step and prediction in one pass (fused), one after the other,
    and by the last displacement; and of a dry step (prediction "in_progress"). With 100 million weights it takes 10 minutes and
    6 GB of memory.

    \b
    Examples:
      pipeoptim bench predict --weights 20e6 --threads 1
          Two minutes.
      pipeoptim bench predict --optimizer AdamW --optimizer SGD --add
          Measures these two anew and leaves the rest of the file as it is.
      pipeoptim bench predict --device cuda --optimizer AdamW
          What the prediction's kernel for GPUs reaches of the speed of a copy.
    """
    from pipeoptim.bench.predict import IN_PROGRESS_TABLE, measure, merged
    from pipeoptim.bench.record import Record
    from pipeoptim.kernels.allocation import keep_freed_memory

    at_least(1e6, weights=weights)
    at_least(1, threads=threads, repeats=repeats)
    at_most(1024, threads=threads)
    at_least(0, budget=budget)
    keep_freed_memory()  # as a training run does, where one backward leaves its gradients where those of another were
    out = out or Path("benchmarks/results") / ("predict.json" if device == "cpu" else "predict_cuda.json")
    _check_kept("predict", out, add, weights=weights, device=device, threads=[])
    record = measure(weights, threads, repeats, budget, optimizer, device)
    _report(merged(Record.read(out), record) if add and out.is_file() else record, out)
    for row in record.rows:
        if row.settings.get("table") == IN_PROGRESS_TABLE:
            typer.echo(f"{row.name}: {row.settings['ratio']:.2f} of the step, by passes {row.settings['model_ratio']:.2f}")


def _sized(text: str) -> tuple[str, int]:
    name, _, batch = text.rpartition("=")
    if not name or not batch.isdecimal() or int(batch) < 1:
        raise ConfigError(f"model is {text!r}, must be a model and its mini-batch, for example mlp=64")
    return name, int(batch)


def _check_kept(benchmark: str, out: Path, add: bool, **settings: Any) -> None:
    """Before anything is measured: raises ConfigError where :func:`_report` could not add to what ``out`` holds."""
    from pipeoptim.bench.predict import merged as merged_predictions
    from pipeoptim.bench.record import Record, merged

    if add and out.is_file():
        merge = merged_predictions if benchmark == "predict" else merged
        merge(Record.read(out), Record(benchmark, "", settings, []))


def _report(record: Record, out: Path, add: bool = False) -> None:
    from rich.table import Table

    from pipeoptim.bench.record import Record, merged
    from pipeoptim.bench.tables import caption, columns
    from pipeoptim.telemetry.console import table_console

    if add and out.is_file():
        record = merged(Record.read(out), record)
    head, body = columns(record)
    table = Table(*head)
    for cells in body:
        table.add_row(*cells)
    console = table_console(180)
    console.print(table)
    console.print(caption(record))
    console.print(f"written to {record.write(out)}")
