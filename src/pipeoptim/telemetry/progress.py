"""Progress on the screen: a bar in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Without a terminal: at most one line per so many seconds.
LINE_EVERY = 10.0


class ProgressView:
    """Progress of a run of ``steps`` mini-batches that starts after ``start``.

    Args:
        quiet: show nothing.
        bar: a bar in a terminal, which a thread redraws.
    """

    def __init__(self, name: str, steps: int, start: int = 0, quiet: bool = False, bar: bool = True) -> None:
        self._console = Console(quiet=quiet, highlight=False)
        self._name, self._steps, self._start = name, steps, start
        self._bar: Progress | None = None
        self._wants_bar = bar
        self._validation = ""
        self._began = self._said = time.monotonic()

    def __enter__(self) -> ProgressView:
        if self._wants_bar and self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task(self._name, total=self._steps, completed=self._start, figures="starting")
            self._bar.start()
        return self

    def step(self, step: int, loss: float, rate: float) -> None:
        """Mini-batch ``step`` is done."""
        figures = f"loss {loss:.4f}{self._validation}  {rate:.0f} samples/s"
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif time.monotonic() - self._said >= LINE_EVERY:
            self._line(step, f"{figures}  {self._left(step)}")

    def validation(self, step: int, loss: float) -> None:
        """A validation is done."""
        self._validation = f"  val {loss:.4f}"
        if not self._bar:
            self._line(step, f"validation loss {loss:.4f}")

    def note(self, text: str) -> None:
        """A line that stays."""
        (self._bar.console if self._bar else self._console).print(text)

    def _line(self, step: int, text: str) -> None:
        self._said = time.monotonic()
        self._console.print(f"{self._name} step {step}/{self._steps}  {text}", soft_wrap=True)

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._began) / max(1, step - self._start) * (self._steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
