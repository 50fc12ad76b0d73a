"""The end of a run in a few lines: figures, what each stage held, where everything is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table

from pipeoptim.telemetry.console import table_console
from pipeoptim.telemetry.prediction_advice import advice


class _Stage(Protocol):
    @property
    def stage(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def gap(self) -> int: ...
    @property
    def weight_copies(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def updates(self) -> int: ...
    @property
    def skipped(self) -> int: ...
    @property
    def clipped(self) -> int | None: ...
    @property
    def prediction_error(self) -> float | None: ...
    @property
    def prediction_scale(self) -> float | None: ...
    @property
    def best_scale(self) -> float | None: ...
    @property
    def idle(self) -> float | None: ...
    @property
    def waiting(self) -> float | None: ...
    @property
    def communication(self) -> float | None: ...
    @property
    def ideal_idle(self) -> float | None: ...


class _Result(Protocol):
    @property
    def run_dir(self) -> Path: ...
    @property
    def status(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def train_loss(self) -> float | None: ...
    @property
    def val_loss(self) -> float | None: ...
    @property
    def val_metrics(self) -> dict[str, float]: ...
    @property
    def samples_per_second(self) -> float | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def stages(self) -> tuple[_Stage, ...]: ...
    @property
    def data(self) -> str: ...
    @property
    def versions(self) -> dict[str, str]: ...


def print_summary(result: _Result, steps: int, how: str, console: Console | None = None) -> None:
    """Print ``result`` of a run of ``steps`` mini-batches; ``how`` names the method and the engine."""
    console = console or table_console()
    figures = (
        [f"train loss {result.train_loss:.4f} (mean over the last 5 % of the steps)"] if result.train_loss is not None else []
    )
    if result.val_loss is not None:
        figures.append(f"validation loss {result.val_loss:.4f}")
    figures += [f"{name.removeprefix('val_')} {value:.4g}" for name, value in result.val_metrics.items()]
    speed = "" if result.samples_per_second is None else f", {result.samples_per_second:.1f} samples/s"
    console.print(f"{result.status} at step {result.step} of {steps}: {', '.join(figures)}", soft_wrap=True)
    console.print(f"{result.seconds:.1f} s{speed}; {how}", soft_wrap=True)
    console.print(_stages(result.stages))
    for s in result.stages:
        if told := advice(s.stage, s.prediction_error, s.prediction_scale, s.best_scale):
            console.print(told, soft_wrap=True)
    traced = any(s.ideal_idle is not None for s in result.stages)
    if traced:
        console.print(_times(result.stages))
    console.print(f"data: {result.data}", soft_wrap=True)
    console.print("versions: " + ", ".join(f"{name} {value}" for name, value in result.versions.items()), soft_wrap=True)
    places = [("metrics", "metrics.jsonl"), ("curve", "loss.png"), ("checkpoints", "checkpoints")]
    places += [("trace", "trace/trace.json"), ("picture of it", "trace/trace.svg")] if traced else []
    for label, name in places:
        console.print(f"{label}: {result.run_dir / name}", soft_wrap=True)


def _stages(stages: tuple[_Stage, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    skipped = any(s.skipped for s in stages)
    clipped = any(s.clipped is not None for s in stages)
    measured = any(s.prediction_error is not None for s in stages)
    for name in (
        "stage",
        "weights",
        "gap",
        "copies",
        "held",
        "updates",
        *(["left out"] if skipped else []),
        *(["tensors clipped"] if clipped else []),
        *(["prediction error", "scale", "best"] if measured else []),
    ):
        table.add_column(name, justify="right")
    for s in stages:
        cells: tuple[str, ...] = (
            f"{s.parameters:,}",
            str(s.gap),
            str(s.weight_copies),
            _size(s.weight_bytes),
            f"{s.updates:,}",
        )
        cells += (f"{s.skipped:,}",) if skipped else ()
        cells += (f"{s.clipped or 0:,}",) if clipped else ()
        figures = (s.prediction_error, s.prediction_scale, s.best_scale)
        errors = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        table.add_row(str(s.stage), *cells, *(errors if measured else []))
    return table


def _times(stages: tuple[_Stage, ...]) -> Table:
    """How the traced time was spent."""
    table = Table(box=None, pad_edge=False)
    for name in ("stage", "idle", "of it waiting", "messages", "idle in the ideal schedule"):
        table.add_column(name, justify="right")
    for s in stages:
        shares = (s.idle, s.waiting, s.communication, s.ideal_idle)
        table.add_row(str(s.stage), *("-" if share is None else f"{share:.1%}" for share in shares))
    return table


def _size(count: float) -> str:
    """Bytes for people.

    >>> _size(1536), _size(3 * 2**20)
    ('1.5 KiB', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
