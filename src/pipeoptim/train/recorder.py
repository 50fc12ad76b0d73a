"""Records the figures of a session in the process of the last stage: rows of the metrics file, and the same on the screen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pipeoptim.errors import DivergedError, first_line
from pipeoptim.telemetry.loggers import RunLogger
from pipeoptim.telemetry.metrics import MetricsFile, Row
from pipeoptim.telemetry.prediction import Changes, scalars
from pipeoptim.telemetry.progress import ProgressView
from pipeoptim.telemetry.timing import SlowStages, times_of
from pipeoptim.train.events import RunEvents

#: Mini-batches that a rate is averaged over.
WINDOW = 20


class Recorder:
    """Writes the rows of a session and remembers what its result needs.

    Args:
        loggers: where they go besides, by name.
        events: who is told of them.
        skips: whether mini-batches may be left out.
    """

    def __init__(
        self,
        file: MetricsFile,
        view: ProgressView,
        loggers: Mapping[str, RunLogger] | None = None,
        events: RunEvents | None = None,
        skips: bool = False,
    ) -> None:
        self._skips = skips
        self._file, self._view, self._loggers = file, view, dict(loggers or {})
        self._events = events or RunEvents()
        self._changes, self._slow = Changes(), SlowStages()
        self._times: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # samples and seconds of each
        self._samples, self._seconds = 0, 0.0
        self.val_loss: float | None = None
        self.val_metrics: dict[str, float] = {}

    def step(self, step: int, loss: float, lr: float, seconds: float, samples: int, left_out: bool = False) -> None:
        """Mini-batch ``step`` (from 1), of so many ``samples``, took ``seconds``; ``left_out``: nothing was trained on it.

        Raises:
            DivergedError: the loss is NaN or infinite, and such mini-batches are not left out.
        """
        if left_out or (self._skips and not math.isfinite(loss)):
            self._file.write(step=step, skipped=True)
            self._view.note(f"step {step} left out: the loss is {loss}")
            return
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {step} with lr {lr:g}; lower --lr, or choose another method")
        self._times.append((samples, seconds))
        self._samples, self._seconds = self._samples + samples, self._seconds + seconds
        rate = sum(n for n, _ in self._times) / max(1e-9, sum(t for _, t in self._times))
        self._file.write(step=step, loss=loss, lr=lr, samples_per_second=round(rate, 2))
        self._view.step(step, loss, rate)
        self._log_scalars(step, {"train/loss": loss, "train/lr": lr, "train/samples_per_second": rate})
        self._events.step(step, loss)

    def validation(self, step: int, loss: float, metrics: dict[str, float]) -> None:
        """A validation after mini-batch ``step``. Figures that are not finite are left out of the row."""
        named = {f"val_{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self._file.write(step=step, **({"val_loss": loss} if math.isfinite(loss) else {}), **named)
        self._view.validation(step, loss)
        self.val_loss, self.val_metrics = (loss if math.isfinite(loss) else None), named
        self._log_scalars(
            step, {"validation/loss": loss, **{f"validation/{k.removeprefix('val_')}": v for k, v in named.items()}}
        )
        self._events.validation(step, {"val_loss": loss, **{f"val_{name}": value for name, value in metrics.items()}})

    def recall(self, rows: Sequence[Row], step: int) -> bool:
        """Take the figures of a run that has been trained to its end from what it has written. Returns whether it validated there."""
        validations = [row for row in rows if row.get("step") == step and any(name.startswith("val_") for name in row)]
        for row in validations:
            self.val_loss = row.get("val_loss")
            self.val_metrics = {name: value for name, value in row.items() if name.startswith("val_") and name != "val_loss"}
        return bool(validations)

    def sync(self) -> None:
        """What was written is on the disk when this returns: before a checkpoint after which it will not be written again."""
        self._file.sync()

    def prediction(self, step: int, measured: list[dict[str, Any]]) -> None:
        """The prediction errors of all stages, as they were after mini-batch ``step``; no row where there are none."""
        if not measured:
            return
        self._file.write(step=step, prediction=measured)
        for sentence in self._changes.note(measured):
            self._view.note(sentence)
        self._log_scalars(step, scalars(measured))

    def timing(self, step: int, measured: list[dict[str, Any]]) -> None:
        """How long each stage took, as of mini-batch ``step``; what has become slow is said. No row where it is not known yet."""
        if not measured:
            return
        self._file.write(step=step, timing=measured)
        for sentence in self._slow.note(times_of(measured)):
            self._view.note(sentence)
        figures = {f"timing/{name}/stage{row['stage']}": row[name] for row in measured for name in ("computing", "waiting")}
        self._log_scalars(step, figures)

    def _log_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, logger in list(self._loggers.items()) if self._loggers else ():
            try:
                logger.scalars(step, values)
            except Exception as error:  # whatever a tool of somebody else's throws: training is worth more
                del self._loggers[name]
                self._view.note(f"logger {name} failed at step {step} and gets nothing more ({first_line(error)})")

    def note(self, text: str) -> None:
        """Show a line."""
        self._view.note(text)

    @property
    def samples_per_second(self) -> float | None:
        """Over the whole session, validations and checkpoints not counted."""
        return self._samples / max(1e-9, self._seconds) if self._samples else None
