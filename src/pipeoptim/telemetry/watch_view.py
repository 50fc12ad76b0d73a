"""A watched run as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeoptim.telemetry.timing import SLOWER
from pipeoptim.telemetry.watched_run import WatchedRun

_BLOCKS = "▁▂▃▄▅▆▇█"


def picture(run: WatchedRun, gaps: Sequence[int | None], width: int) -> Group:
    """The whole view.

    Args:
        gaps: version gap of each stage.
        width: columns.
    """
    return Group(_title(run), _progress(run, width), _figures(run), Text(curve(run.losses, width)), _stages(run, gaps))


def _title(run: WatchedRun) -> Text:
    config = run.config
    how = f"{config.get('method')}, {config.get('stages')} stages, engine {config.get('engine')}"
    return Text(f"{run.folder.name}: {run.status()}  ({how})", style="bold")


def _progress(run: WatchedRun, width: int) -> Table:
    row = Table.grid(padding=(0, 1))
    left = run.seconds_left
    eta = "" if left is None or run.ended else f"{_clock(left)} left"
    told = f"{run.step}/{run.steps or '?'}"
    bar = ProgressBar(total=max(1, run.steps), completed=run.step, width=max(10, width - len(told) - len(eta) - 4))
    row.add_row(bar, told, eta)
    return row


def _figures(run: WatchedRun) -> Text:
    parts = [] if run.loss is None else [f"loss {run.loss:.4f}", f"{run.rate:.0f} samples/s"]
    losses = [(figures["val_loss"], step) for step, figures in run.validations if "val_loss" in figures]
    if losses:
        (best, at), (last, step) = min(losses), losses[-1]
        parts.append(
            f"validation {last:.4f} at step {step}" + (f", best {best:.4f} at step {at}" if at != step else ", the best")
        )
    if run.recent:
        parts.append(f"lr {run.recent[-1].get('lr', 0):.3g}")
    return Text("  ".join(parts) or "nothing is trained yet")


def curve(losses: Sequence[float], width: int) -> str:
    """The losses as one line of blocks, from the highest (full) to the lowest, each the mean of its part.

    >>> curve([4.0, 3.0, 2.0, 1.0], 4)
    '█▆▃▁'
    """
    count = min(width, len(losses))
    edges = [i * len(losses) // count for i in range(count + 1)] if count else []
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


def _stages(run: WatchedRun, gaps: Sequence[int | None]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "gap", "computing ms", "waiting ms", "state", "prediction error"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for k, gap in enumerate(gaps):
        timing, measured = run.timing.get(k), run.prediction.get(k)
        error = None if measured is None else measured.get("relative_error")
        table.add_row(
            str(k),
            "?" if gap is None else str(gap),
            "" if timing is None else f"{1e3 * timing['computing']:.2f}",
            "" if timing is None else f"{1e3 * timing['waiting']:.2f}",
            _state(timing),
            "" if error is None else f"{error:.3f}",
        )
    return table


def _state(timing: dict[str, float] | None) -> str:
    if timing is None:
        return ""
    busy = timing["computing"] / max(1e-12, timing["computing"] + timing["waiting"])
    slow = f", {timing['slowed']:.2f} times as slow as at first" if timing.get("slowed", 1.0) >= SLOWER else ""
    return f"busy {busy:.0%}{slow}"


def _clock(seconds: float) -> str:
    """
    >>> _clock(3725)
    '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
