"""The events of a run, and what a callback may see and do at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeoptim.telemetry.metrics import Row, read_rows

if TYPE_CHECKING:
    from pipeoptim.config import TrainConfig
    from pipeoptim.engine.pipeline import Pipeline
    from pipeoptim.train.result import RunResult


@dataclass(frozen=True)
class RunView:
    """A session of a run, as callbacks see it.

    Attributes:
        config: of the run.
        folder: its directory.
        pipe: the pipeline; here with the stages of this process.
        start: mini-batches done before this session.
        reports: whether this is the process of the last stage, which has the losses.
    """

    config: TrainConfig
    folder: Path
    pipe: Pipeline
    start: int
    reports: bool
    _ask: Callable[[str], None]
    _say: Callable[[str], None]

    def rows(self) -> list[Row]:
        """What ``metrics.jsonl`` has so far, also of earlier sessions."""
        return read_rows(self.folder / "metrics.jsonl")

    def stop(self, reason: str) -> None:
        """End the run as finished: it drains and saves after this mini-batch or the next few. Where the losses are."""
        self._ask(reason)

    def say(self, text: str) -> None:
        """Show a line on the screen, where the losses are."""
        self._say(text)


class Callback:
    """Override the events that matter.

    ``on_start`` and ``on_update`` are called in every process, the others in the process of the last stage, in the order of the names
    in ``callbacks``. An exception ends the run. A callback keeps no state of its own in checkpoints: what it needs in a resumed run
    it finds in ``run.rows()`` or in files of its own in ``run.folder``.

    Example:
        >>> class Halve(Callback):
        ...     def on_eval(self, run, step, figures):
        ...         if figures["val_loss"] < 0.5:
        ...             run.stop("good enough")
    """

    def on_start(self, run: RunView) -> None:
        """A session begins; a resumed one at ``run.start``, whose later rows are gone."""

    def on_step(self, run: RunView, step: int, loss: float) -> None:
        """``step`` mini-batches are done, the last with ``loss``."""

    def on_update(self, run: RunView, k: int, version: int) -> None:
        """Stage ``k`` has updated its weights, in the middle of a step; they are in ``run.pipe.stage_module(k)``."""

    def on_eval(self, run: RunView, step: int, figures: Mapping[str, float]) -> None:
        """A validation after ``step`` mini-batches: ``val_loss`` and one ``val_<name>`` per metric; perhaps not finite."""

    def on_checkpoint(self, run: RunView, step: int, folder: Path) -> None:
        """A checkpoint of ``step`` mini-batches is complete in ``folder``, which is removed when newer ones have come.

        With ``saving="background"`` this is told when the next one begins, or training ends: after later steps and validations.
        """

    def on_stop(self, run: RunView, result: RunResult) -> None:
        """The session has ended well, and its result is written."""
