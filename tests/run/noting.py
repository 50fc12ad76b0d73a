"""A callback and a logger of a user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pipeoptim.telemetry.loggers import LoggedRun
from pipeoptim.train.callbacks import Callback, RunView


class Note(Callback):
    """Notes all events, in this process and in a file per process; ends the run at step ``end``."""

    def __init__(self, end: int = 0) -> None:
        self.end, self.seen = end, []

    def _note(self, run: RunView, *event: Any) -> None:
        self.seen.append(event)
        with (run.folder / f"events-{os.getpid()}.txt").open("a") as file:
            print(*event, file=file)

    def on_start(self, run: RunView) -> None:
        self._note(run, "start", run.start, run.reports)

    def on_step(self, run: RunView, step: int, loss: float) -> None:
        self._note(run, "step", step, loss)
        if step == self.end:
            run.stop("that was enough")

    def on_update(self, run: RunView, k: int, version: int) -> None:
        assert k in run.pipe.local_stages
        self._note(run, "update", k, version)

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        self._note(run, "eval", step, dict(figures))

    def on_checkpoint(self, run: RunView, step: int, folder: Path) -> None:
        self._note(run, "checkpoint", step, (folder / "meta.json").exists())

    def on_stop(self, run: RunView, result: Any) -> None:
        self._note(run, "stop", result.step, (run.folder / "result.json").exists())


class Memory:
    """A logger that keeps everything; fails at step ``fails``."""

    opened: ClassVar[list[Memory]] = []

    def __init__(self, run: LoggedRun, fails: int = 0) -> None:
        self.run, self.fails, self.values, self.closed = run, fails, [], False
        self.opened.append(self)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails:
            raise ConnectionError("the server is gone")
        self.values += [(step, name, value) for name, value in values.items()]

    def close(self) -> None:
        self.closed = True
