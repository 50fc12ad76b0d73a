"""Progress of a comparison: one bar for all runs in a terminal, a line per finished run elsewhere."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from pipeoptim.compare.folder import ComparisonFolder
from pipeoptim.compare.plan import PlannedRun
from pipeoptim.compare.worker import OUTCOME
from pipeoptim.errors import counted


class Progress:
    """Progress of ``runs`` of which ``done`` were finished before.

    Args:
        quiet: show nothing.
    """

    def __init__(self, folder: ComparisonFolder, total: int, done: int, steps: int, quiet: bool) -> None:
        self.folder, self.total, self.done, self.steps = folder, total, done, steps
        self.console = Console(quiet=quiet, highlight=False)
        self.lock = threading.Lock()
        self.active: dict[str, Path] = {}
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        if self.done:
            self.console.print(f"{self.done} of {counted(self.total, 'run')} were finished before", soft_wrap=True)
        if self.console.is_terminal and not self.console.quiet and self.done < self.total:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("starting", total=(self.total - self.done) * self.steps)
            self.bar.start()
            self.first = self.done
        return self

    def began(self, run: PlannedRun) -> None:
        """``run`` has begun."""
        with self.lock:
            self.active[run.name] = self.folder.run(run.name) / "metrics.jsonl"

    def ended(self, run: PlannedRun) -> None:
        """``run`` has ended; how is in its folder."""
        with self.lock:
            self.active.pop(run.name, None)
            self.done += 1
            outcome = json.loads((self.folder.run(run.name) / OUTCOME).read_text())
            reason = f": {outcome['reason']}" if "reason" in outcome else ""
            if self.bar is None or outcome["status"] != "finished":
                console = self.bar.console if self.bar else self.console
                console.print(f"{self.done}/{self.total} {run.name} {outcome['status']}{reason}", soft_wrap=True, markup=False)

    def look(self) -> None:
        """Bring the bar up to date from the metrics files of the runs at work."""
        if self.bar is None:
            return
        with self.lock:
            steps = sum(_last_step(path) for path in self.active.values())
            names = ", ".join(self.active) or "ending"
            completed = (self.done - self.first) * self.steps + steps
            self.bar.update(self.task, completed=completed, description=f"{self.done}/{self.total} runs  {names}")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()


def _last_step(path: Path) -> int:
    """The step of the last complete row, read from the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 1000))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
